"""What a temporal module costs: the paper's Table 7 and more, CMR beside its peers. ``python -m benchmarks.runtime``.

``models`` says what is compared, ``plan`` in which studies, ``measure`` runs them, ``render`` and ``plot`` show them.
"""
