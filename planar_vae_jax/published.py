"""Published figures, to be drawn beside one's own."""

REPRODUCTION = "a reproduction of\nRezende & Mohamed"
# Figure -> K -> nats an image, on the static binarised MNIST of Larochelle & Murray, in a public reproduction of
# Rezende & Mohamed (2015): amortised planar flows, 784-400-400 networks, 40 latents, 500,000 updates.
AMORTIZED_PLANAR = {
    "free_energy": {0: 98.14, 10: 93.48, 20: 92.28, 40: 91.34, 80: 90.86},
    "nll": {0: 92.58, 10: 88.95, 20: 88.09, 40: 87.45, 80: 87.09},
}
