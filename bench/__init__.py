"""Benchmarks: `python -m bench <op|all>` measures, `python -m bench compare a.json b.json` judges two runs."""
