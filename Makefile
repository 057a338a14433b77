# The course's commands; what they do is in notebooks/lab.py.
#   make lab                  set up, and open the course (NO_BROWSER=1: print the address only; ARGS="--port=9000")
#   make test                 set up, and prove everything
#   make lint                 ruff and import-linter alone
#   make notebooks            rebuild the lessons whose source changed (ALL=1: all, LIVE=1: live cells too)
#   make bench                measure this machine, write receipts (ARGS="...")
#   make doctor               what this machine is and can do (ARGS=--json)
#   make reset LESSON=01      a fresh copy of a lesson in my/; yours is kept beside it
# PYTHON=... chooses the Python that .venv is made from; otherwise the one at hand, if it is 3.11 to 3.13.

SUITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c '$(SUITS)' >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3)
LAB = "$(PYTHON)" notebooks/lab.py

.PHONY: lab test lint notebooks bench doctor reset

lab:
	@$(LAB) lab $(if $(NO_BROWSER),--no-browser) $(ARGS)

test:
	@$(LAB) test $(ARGS)

lint:
	@$(LAB) lint

notebooks:
	@$(LAB) notebooks $(if $(LIVE),--live) $(if $(ALL),--all) $(ARGS)

bench:
	@$(LAB) run bench $(ARGS)

doctor:
	@$(LAB) run doctor $(ARGS)

reset:
	@$(LAB) reset "$(LESSON)"
