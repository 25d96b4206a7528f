# Two commands: `make demo` and `make test`. Both make a virtual environment and install all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint clean

# The constraint keeps torch to one version; where a CPU build of it is at hand, pip takes that one.
$(BIN)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(BIN)/.test: $(BIN)/.core
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: $(BIN)/.core
	$(BIN)/sparrow ground spaces_demo/examples/stars.mp4 "the green star" --output demo_output
	@echo "Open demo_output/overlay.mp4 to see it; demo_output/result.json holds boxes, masks and times."

test: $(BIN)/.test lint
	$(BIN)/python -m pytest

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo_output
