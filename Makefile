.PHONY: style quality test

style:          ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

quality:        ## check it
	ruff check .
	ruff format --check .

test:           ## run the whole suite, a process for each core
	python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
