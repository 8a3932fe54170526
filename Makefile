# PYTHON=... uses the torch of that interpreter; without it everything lives in .venv.
PYTHON ?= .venv/bin/python

.PHONY: build
build:
	$(PYTHON) setup.py build_ext --inplace
