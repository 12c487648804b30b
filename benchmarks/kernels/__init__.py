"""Compile every kernel that a ResNet-50 launches, without a GPU: check what the compiler made of it, predict its time.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json
    python -m benchmarks.kernels --predict --out benchmarks/results/kernels-prediction.json
    python -m benchmarks.kernels --predict --mode fused --out benchmarks/results/kernels-prediction-fused.json
    python -m benchmarks.kernels --predict --batches 1 --kernels mix pool --stages 256x56

A network runs on fake tensors (:mod:`.network`), and its launches are recorded (:mod:`.record`). They are compiled
for sm_80, sm_90 and sm_120 (:mod:`.compiled`, :mod:`.sass`). On sm_90 a program of each launch runs through its
machine code (:mod:`.emulate`, :mod:`.semantics`, :mod:`.examine`). From that come what a report says (:mod:`.facts`),
what must not ship (:mod:`.limits`), and a predicted time (:mod:`.model`, :mod:`.prediction`). A prediction is an
estimate, +-30 % for what waits on memory, and never a measurement. No GPU is needed, and no kernel runs.

After a change to a kernel: trip counts, addresses and bytes come from the code, so nothing has to be told here. The
launchers are found in ``cmr_layers/ops/triton_*.py``. What may need a line in :mod:`.limits` are a new kernel
(RATIOS), a kernel that has become faster (RATIOS), and one that no longer fails (KNOWN). An instruction that
``semantics.py`` does not know fails by its name. Then make the prediction anew; ``kernels-prediction-before.json`` is
what the page compares it with.
"""
