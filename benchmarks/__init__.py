"""Measurements beside other libraries; run them as ``python -m benchmarks.NAME``.

``flows``, ``epoch``, ``time_to_quality``, ``scaling``, ``accelerator``, ``tpu_compile``. What they share:
``peers`` and ``problems`` (flows of other libraries), ``our_training``, ``torch_training``, ``torch_models``,
``products``, ``race``, ``timing``, ``report``, ``device``.
"""
