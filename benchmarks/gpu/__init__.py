"""All that a first hour with a GPU should bring, as one command: ``python -m benchmarks.gpu``.

``steps`` says what runs in which order and for how long, ``process`` runs it. ``about``, ``check``, ``small``,
``ahead`` and ``kernels`` are steps; the others are runs of :mod:`benchmarks.runtime`. ``tables`` shows what they wrote.
"""
