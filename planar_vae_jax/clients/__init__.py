"""Planar flows inside other libraries: one module a library, which needs that library and is imported by its name.

=============  ================  ===================================================================================
module         extra to install  what it has
=============  ================  ===================================================================================
``numpyro``    ``numpyro``       ``PlanarTransform``, a transform of distributions; ``AutoPlanar``, a guide.
``flowjax``    ``flowjax``       ``PlanarBijection``; ``from_flowjax``, the layers of a flow trained in FlowJAX.
``distrax``    ``distrax``       ``PlanarBijector``.
=============  ================  ===================================================================================

Importing this package imports none of them. BlackJAX, Flax, Equinox and TensorFlow Probability need no module:
``docs/clients/others.md`` shows them.
"""
