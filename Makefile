# Every way in. `make` alone lists it all, from the comments below.
# What runs a model goes by way of scripts/launch.py, into a container of our image or into .venv. What is for this
# repository itself runs in .venv and depends on `setup`, which makes it once and then costs a few hundredths of a second.

PYTHON ?= python3
export PYTHONPATH := $(CURDIR)/recipes:$(CURDIR)/scripts$(if $(PYTHONPATH),:$(PYTHONPATH))
.DEFAULT_GOAL := help

#= MODEL=qwen2.5-7b              a card's name (see `make models`), a local folder or a hub id; else tiny
#= DATA="my data.jsonl"          a file, a folder or a hub dataset; else the sample in data_samples/
#= TASK=dpo                      what the data is for: sft, dpo, grpo, ppo or reward; else its columns tell
#= OUT=outputs/try-3             the folder of the run; else outputs/METHOD-MODEL-HASH
#= ADAPTER=outputs/try-3/adapter an adapter, on top of MODEL or of the base its run names
#= REWARDS="math my.py:shorter"  what test-rewards, distill and preferences score by: names, or your functions
#= REWARD=outputs/try-5          the run of `make reward` that scores for PPO; else DATA trains one
#= ARGS="--max-steps 50"         more for the command behind the target; ARGS=--help lists what it takes
#= A=outputs/try-3/adapter       what `make compare` holds against B: an adapter or a model
#= B=outputs/try-4/adapter       the other of the two
#= BASE=qwen2-1.5b               the model under A and B, where no run beside them names it
#= PROMPTS=my.jsonl              what it asks both; else the 50 prompts in data_samples/
#= STAGES=sft,grpo               what `make pipeline` runs, in this order; else sft,dpo,grpo
#= SFT_DATA=chats.jsonl          examples of good answers, for its SFT stage
#= DPO_DATA=pairs.jsonl          pairs of answers, for its DPO stage
#= MATH_DATA=gsm8k.jsonl         problems with gold answers, for its GRPO stage
#= EVAL_DATA=test.jsonl          held-out data, one file or several; else put aside from the stages' data
#= ARGS_SFT="--max-steps 50"     more for its SFT stage alone
#= ARGS_DPO="--beta 0.2"         more for its DPO stage alone
#= ARGS_GRPO="--rewards math"    more for its GRPO stage alone
#= ARGS_EVAL="--load-in-4bit"    more for the evaluation after each of its stages
#= RECIPE=sft                    what `make slurm` submits
#= PIPELINE=sft,dpo,grpo         or these, as a chain of jobs, with the variables of `make pipeline`
#= SWEEP="seed=1,2 lora_r=8,16"  or RECIPE with every choice of these arguments, as an array of jobs
#= TIME=4:00:00                  the time limit of a job; it stops before, and is queued again until done
#= NODES=2                       the nodes of a job; else 1
#= PARTITION=gpu                 as sbatch has it, and so ACCOUNT, QOS, CONSTRAINT
#= ACCOUNT=mine                  as sbatch has it
#= QOS=normal                    as sbatch has it
#= CONSTRAINT=h200               as sbatch has it
#= SBATCH="--mem=64G"            more for sbatch
#= DRY=1                         show a job's script and submit nothing
#= VARIANT=cuda-vllm             what to install: cpu, cuda or cuda-vllm; else as before, or what suits here
#= RUNTIME=podman                docker, podman, apptainer or local (.venv); else docker if the image is here
#=                               a job: docker, apptainer, pyxis or local; else local
#= IMAGE=registry/recipes:1.0    the image; else recipes:VARIANT; for apptainer a .sif file
#= GPUS=0,2                      the GPUs that a container gets; else all
#=                               a job: how many of each node, as 8 or h200:8; else none
#= DOCKER=/path/to/docker        the program for images and containers; else docker or podman
#= DOCKER_LIMITS=                ulimits of a container, here none; else those that NVIDIA asks for
#= DOCKER_ARGS="--network none"  more for `docker run`
#= BAKE=1                        an image with the recipes in it, for clusters and registries
#= BASE_IMAGE=debian:bookworm    what an image starts from; else docker/Dockerfile's, by digest
#= WHEELS=/my/wheels             a folder of wheels for an image, besides those of the index
#= CA_BUNDLE=/my/ca.pem          certificates to trust while it is built; else SSL_CERT_FILE
#= FLASH_ATTN=1                  compile flash-attn 2 into it, for hours; XFORMERS=1: xformers
#= GPU_ARCHITECTURES="9.0"       the GPUs to compile these for; else 8.0 to 12.0
#= PYTHON=/path/to/python3.12    3.11 or newer, to make .venv with; else python3
#= TORCH_CPU_LINKS=/my/wheels    folder or URL of the CPU torch; else pip's find-links or PyTorch's page

# One word for the shell, whatever is in it.
quote = '$(subst ','\'',$(1))'
# $(call flag,--data,$(DATA)) is nothing when DATA is not given: the recipe's own default holds.
flag = $(if $(2),$(1) $(call quote,$(2)))
# The same as one word, for a value that looks like a flag itself.
joined = $(if $(2),$(1)=$(call quote,$(2)))
no_python = there is no $(PYTHON) here: install Python 3.11 or newer, or make PYTHON=/path/to/python3.12
# A whole .venv looks after itself: its interpreter starts faster than the shim of a version manager.
python = $(if $(and $(wildcard .venv/lock.sha256),$(wildcard .venv/bin/python)),exec .venv/bin/python,$(has_python) && exec $(call quote,$(PYTHON)))
# Where a command runs: RUNTIME, else a container if Docker and our image are here, else .venv. One line of it says so.
run = @$(python) scripts/launch.py
# Nothing need be installed on a login node, but what is in recipes/common is for a modern Python.
modern_python = { ($(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))') 2>/dev/null || { echo "make: this needs Python 3.11 or newer: make setup, or make PYTHON=/path/to/python3.12" >&2; exit 3; }; }
has_python = { command -v $(call quote,$(PYTHON)) >/dev/null || { echo "make: $(no_python)" >&2; exit 3; }; } && { $(call quote,$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: $(PYTHON) is older than Python 3.11: make PYTHON=/path/to/python3.12" >&2; exit 3; }; }

.PHONY: help setup sft dpo grpo reward ppo merge pipeline distill preferences choose test-rewards check check-data evaluate compare benchmark models pin shell slurm slurm-status image pin-base tiny samples test test-docker test-slurm lint lock lock-check clean

help: ## this list
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 } \
		/^#= / { variables = variables "\n  " substr($$0, 4) } \
		END { print "\nVariables, each with an example" variables }' Makefile

##@ Train
sft: ## teach a model to answer the way your examples do: MODEL DATA OUT ARGS
	$(run) recipes/sft.py $(call flag,--model,$(MODEL)) $(call flag,--data,$(DATA)) $(call flag,--output-dir,$(OUT)) $(ARGS)

dpo: ## prefer the answers you chose over those you rejected: MODEL DATA OUT ARGS
	$(run) recipes/dpo.py $(call flag,--model,$(MODEL)) $(call flag,--data,$(DATA)) $(call flag,--output-dir,$(OUT)) $(ARGS)

grpo: ## reinforce what rewards can check, as right answers in math: MODEL DATA OUT ARGS
	$(run) recipes/grpo.py $(call flag,--model,$(MODEL)) $(call flag,--data,$(DATA)) $(call flag,--output-dir,$(OUT)) $(ARGS)

reward: ## a reward model, from scores or pairs, for PPO and GRPO: MODEL DATA OUT ARGS
	$(run) recipes/reward.py $(call flag,--model,$(MODEL)) $(call flag,--data,$(DATA)) $(call flag,--output-dir,$(OUT)) $(ARGS)

ppo: ## sample answers, score them by a reward model or rules, learn: MODEL DATA REWARD OUT ARGS
	$(run) recipes/ppo.py $(call flag,--model,$(MODEL)) $(call flag,--data,$(DATA)) $(call flag,--reward-model,$(REWARD)) $(call flag,--output-dir,$(OUT)) $(ARGS)

merge: ## merge an adapter into its base, for the next stage: ADAPTER MODEL OUT
	$(run) scripts/merge.py $(call flag,--adapter,$(ADAPTER)) $(call flag,--model,$(MODEL)) $(call flag,--output-dir,$(OUT)) $(ARGS)

pipeline: ## stage after stage, scored: STAGES MODEL SFT_DATA DPO_DATA MATH_DATA EVAL_DATA OUT ARGS
	$(run) scripts/pipeline.py $(call flag,--stages,$(STAGES)) $(call flag,--model,$(MODEL)) \
		$(call flag,--sft-data,$(SFT_DATA)) $(call flag,--dpo-data,$(DPO_DATA)) $(call flag,--math-data,$(MATH_DATA)) \
		$(if $(EVAL_DATA),--eval-data $(EVAL_DATA)) $(call flag,--output-dir,$(OUT)) \
		$(call joined,--sft-args,$(ARGS_SFT)) $(call joined,--dpo-args,$(ARGS_DPO)) \
		$(call joined,--grpo-args,$(ARGS_GRPO)) $(call joined,--eval-args,$(ARGS_EVAL)) $(ARGS)

distill: ## write a model's accepted answers as data for SFT: MODEL ADAPTER DATA REWARDS OUT ARGS
	$(run) scripts/distill.py $(call flag,--model,$(MODEL)) $(call flag,--adapter,$(ADAPTER)) $(call flag,--data,$(DATA)) $(if $(REWARDS),--rewards $(REWARDS)) $(call flag,--output,$(OUT)) $(ARGS)

preferences: ## build pairs for DPO from answers, scores or choices: MODEL ADAPTER DATA REWARDS OUT ARGS
	$(run) scripts/preferences.py $(call flag,--model,$(MODEL)) $(call flag,--adapter,$(ADAPTER)) $(call flag,--data,$(DATA)) $(if $(REWARDS),--rewards $(REWARDS)) $(call flag,--output,$(OUT)) $(ARGS)

##@ Around a run
check: ## what can this machine run, what is wrong with it, what fixes it? MODEL ARGS="--recipe sft"
	$(run) env-check.py $(call flag,--model,$(MODEL)) $(ARGS)

shell: ## a shell where the recipes run: in a container of the image, or with .venv
	$(run) bash $(ARGS)

choose: ## which stages suit your data, model and GPU: MODEL DATA ARGS
	$(run) scripts/choose.py $(call flag,--model,$(MODEL)) $(call flag,--data,$(DATA)) $(ARGS)

test-rewards: ## does each reward score right answers the most, each by its own row? REWARDS DATA ARGS
	$(run) scripts/test-rewards.py $(if $(REWARDS),--rewards $(REWARDS)) $(call flag,--data,$(DATA)) $(ARGS)

check-data: ## say what is in a data file and what is wrong with it: DATA TASK MODEL ARGS
	$(run) scripts/check-data.py $(call flag,--data,$(DATA)) $(call flag,--task,$(TASK)) $(call flag,--model,$(MODEL)) $(ARGS)

evaluate: ## score a model, with or without an adapter: MODEL ADAPTER DATA ARGS
	$(run) scripts/evaluate.py $(call flag,--model,$(MODEL)) $(call flag,--adapter,$(ADAPTER)) $(call flag,--data,$(DATA)) $(ARGS)

compare: ## two models answer the same prompts, rated blind, to be read: BASE A B PROMPTS OUT ARGS
	$(run) scripts/compare.py $(call flag,--base,$(BASE)) $(call flag,--a,$(A)) $(call flag,--b,$(B)) $(call flag,--prompts,$(PROMPTS)) $(call flag,--output-dir,$(OUT)) $(ARGS)

benchmark: ## measure a recipe's speed and memory on a model's true shape: MODEL ARGS
	$(run) scripts/benchmark.py $(call flag,--model,$(MODEL)) $(ARGS)

models: ## list the model cards
	$(run) scripts/models.py $(ARGS)

pin: setup ## write the hub's present revision into a model card: MODEL
	.venv/bin/python scripts/models.py pin $(call quote,$(MODEL)) $(ARGS)

##@ On a Slurm cluster
slurm: ## submit RECIPE, with SWEEP, or PIPELINE: TIME GPUS NODES PARTITION MODEL DATA OUT ARGS DRY
	@$(modern_python) && $(python) scripts/slurm/submit.py $(call flag,--recipe,$(RECIPE)) $(call flag,--pipeline,$(PIPELINE)) \
		$(call flag,--sweep,$(SWEEP)) $(call flag,--time,$(TIME)) $(call flag,--gpus,$(GPUS)) $(call flag,--nodes,$(NODES)) \
		$(call flag,--partition,$(PARTITION)) $(call flag,--account,$(ACCOUNT)) $(call flag,--qos,$(QOS)) \
		$(call flag,--constraint,$(CONSTRAINT)) $(call joined,--sbatch,$(SBATCH)) $(call flag,--runtime,$(RUNTIME)) \
		$(call flag,--image,$(IMAGE)) $(call flag,--output-dir,$(OUT)) $(if $(DRY),--dry) -- $(call flag,--model,$(MODEL)) \
		$(if $(PIPELINE),$(call flag,--sft-data,$(SFT_DATA)) $(call flag,--dpo-data,$(DPO_DATA)) $(call flag,--math-data,$(MATH_DATA)) \
		$(if $(EVAL_DATA),--eval-data $(EVAL_DATA)) $(call joined,--sft-args,$(ARGS_SFT)) $(call joined,--dpo-args,$(ARGS_DPO)) \
		$(call joined,--grpo-args,$(ARGS_GRPO)) $(call joined,--eval-args,$(ARGS_EVAL)),$(call flag,--data,$(DATA)) \
		$(call flag,--reward-model,$(REWARD))) $(ARGS)

slurm-status: ## what became of the jobs: OUT
	@$(modern_python) && $(python) scripts/slurm/status.py $(call flag,--output-dir,$(OUT))

##@ Work on this repository
setup: ## make .venv from its lock, or again when the lock has changed; the others do so themselves
	@$(python) -m install

image: ## build the image the recipes run in: VARIANT BAKE FLASH_ATTN XFORMERS
	@$(python) -m install.image

pin-base: ## write the digest that the registry gives the base image today into docker/Dockerfile
	@$(python) -m install.image pin-base

test: setup ## run every test: ARGS="-k data"
	.venv/bin/python -m pytest $(ARGS)

test-docker: setup ## build the image and run in it, with an engine of its own; needs root: ARGS
	TEST_DOCKER=$${TEST_DOCKER:-cpu} .venv/bin/python -m pytest -n 0 tests/system/test_docker.py $(ARGS)

test-slurm: setup ## run the tests on a Slurm cluster of this machine's own: needs slurm-wlm and munge
	.venv/bin/python -m pytest -n 0 tests/system/test_slurm.py $(ARGS)

lint: setup ## check the Python and the shell files
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	git ls-files -z --cached --others --exclude-standard | xargs -0 grep -slZIzP '\A#!.*\b(ba)?sh\b' \
		| xargs -0 .venv/bin/shellcheck

lock: ## resolve docker/*.in into docker/*.lock; UPGRADE=1 takes the newest versions
	@$(has_python) && $(call quote,$(PYTHON)) -m install.lock $(if $(UPGRADE),--upgrade)

lock-check: ## does every lock agree with its .in file, and every hash with the index?
	@$(has_python) && $(call quote,$(PYTHON)) -m install.lock --check

tiny: setup ## train the embedded model again: ARGS
	.venv/bin/python scripts/tiny/pretrain.py $(ARGS)

samples: setup ## write data_samples/ again
	.venv/bin/python scripts/tiny/samples.py $(ARGS)

clean: ## remove .venv and .cache; outputs/ stays
	rm -rf .venv .cache
