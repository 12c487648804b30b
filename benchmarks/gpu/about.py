"""The GPU, its clocks and limits, and the versions that everything else was measured with."""
import argparse
import shutil
import subprocess
import sys
from typing import Any

import torch

from benchmarks.machine import result_file, write
from benchmarks.runtime.results import environment

FIELDS = ('name', 'driver_version', 'pstate', 'clocks.sm', 'clocks.mem', 'clocks.max.sm', 'clocks.max.mem',
          'power.limit', 'power.max_limit', 'temperature.gpu', 'ecc.mode.current', 'mig.mode.current')


def smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None where it is not, or does not answer."""
    tool = shutil.which('nvidia-smi')
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, '--id=0', f'--query-gpu={",".join(FIELDS)}', '--format=csv,noheader'], capture_output=True,
            text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(',')]
    return dict(zip(FIELDS, values, strict=True))


def about() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        **environment(), 'capability': list(torch.cuda.get_device_capability()),
        'multiprocessors': properties.multi_processor_count, 'memory_bytes': properties.total_memory,
        'nvidia_smi': smi(), 'compute_sanitizer': shutil.which('compute-sanitizer') is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=result_file, required=True)
    write(parser.parse_args().out, about())
    return 0


if __name__ == '__main__':
    sys.exit(main())
