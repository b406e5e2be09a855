"""`python -m benchmarks NAME [...]`: run one benchmark; without a name, list them."""

import importlib
import sys

from benchmarks import claim, names

if len(sys.argv) < 2 or sys.argv[1] not in names():
    print("python -m benchmarks NAME, one of:")
    for name in names():
        print(f"  {name:15} {claim(name)}")
    sys.exit(0 if len(sys.argv) < 2 else 2)
importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
