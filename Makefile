# Everything goes into .venv. What is installed is remembered in stamp files there: a second call installs nothing.
#   make demo    search on the built-in task, and show the front
#   make test    lint, types and all tests
#   make lint    ruff only
# Another Python: make demo PYTHON=/path/to/python3.12

PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TRIALS ?= 60
OUT ?= runs/demo

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	rm -rf $(OUT)
	$(BIN)/autocompress search digits --target cpu-onnxruntime --trials $(TRIALS) --out $(OUT) > /dev/null
	$(BIN)/autocompress front $(OUT)

test: lint
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs/demo

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: left to the resolver it is the newest one, with whatever that brings.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/demo.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	$(PIP) -e '.[search,onnxruntime,digits,report]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/demo.stamp
