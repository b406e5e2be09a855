"""`python -m benchmarks NAME [...]`: run one benchmark; without a name, list them."""

import importlib
import pkgutil
import sys

import benchmarks

names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_"))
if len(sys.argv) < 2 or sys.argv[1] not in names:
    print("python -m benchmarks NAME, one of:", *names)
    sys.exit(0 if len(sys.argv) < 2 else 2)
importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
