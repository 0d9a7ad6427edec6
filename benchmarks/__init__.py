"""Measurements beside other libraries, run as ``python -m benchmarks.NAME``; results: docs/benchmarks.md.

Commands:
    ``flows``            value and gradient of K planar layers, against FlowJAX, normflows, Pyro and PyTorch
    ``epoch``            a training step of the VAE, against PyTorch and against its matrix products alone
    ``time_to_quality``  seconds of training until a test free energy is reached, against PyTorch
    ``guides``           the quality of variational guides in NumPyro, and of NUTS in their noise
    ``accelerator``      flows and training steps on a GPU or TPU, beside the limits of the device
    ``tpu_compile``      programs compiled for TPU slices on a machine without a TPU

Modules that the commands share:
    ``problems``, ``peers``                  the same flow in each library's parameters, and the libraries' flows
    ``our_training``, ``torch_training``     the same training here and in PyTorch
    ``torch_models``, ``products``           the model in PyTorch; the matrix products of a step
    ``timing``, ``race``, ``device``, ``report``  timing in turns, training in turns, device limits, results on disk
"""
