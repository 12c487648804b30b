"""What CMR costs, beside its peers and against its goals: ``python -m benchmarks.runtime``.

``models`` and ``operators`` say what is compared, ``candidate`` in which modes and settings, ``plan`` in which studies.
``workshop`` builds it, ``measure`` runs a pass with ``timing`` and ``memory``, ``results`` keeps it. ``tables``,
``goals``, ``compare`` and ``plot`` show it, with the one statistic of ``interval``.
"""
