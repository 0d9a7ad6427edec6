"""The variational autoencoder and its objectives."""
