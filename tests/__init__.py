"""Tests: a file is named after the one that it tests, in a room of the same name.

operators/      kernels and Functions against plain torch    scripts/          drivers, package, README
models/         patched models against stock ones            benchmarks/       what the measurements rely on
utils/          arguments, data, loading, trainer            helpers/          what several tests share
conftest.py     what pytest asks of a run of tests; fixtures are in helpers/
"""
