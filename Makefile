# Every target is a command of scripts/run, and `make` lists them all; `make help-sft` shows the arguments of sft.
#
#     make sft MODEL=qwen2.5-7b DATA=my.jsonl MAX_LENGTH=1024 LOAD_IN_4BIT=no
#     scripts/run sft --model qwen2.5-7b --data my.jsonl --max-length 1024 --no-load-in-4bit    the same
#
# Any argument of a command is a variable here, in capitals. Only variables of the command line count: MODEL in the
# environment does nothing. What commands there are, what each takes and where it runs is in scripts/launch/commands.py.

.DEFAULT_GOAL := help

# The variables of the command line reach the environment as they were typed, and RECIPES_GIVEN names them. Without
# $(value) make would expand them: $(shell ...) in the name of a file would be run.
override given := $(foreach name,$(sort $(.VARIABLES)),$(if $(findstring command line,$(origin $(name))),$(name)))
$(foreach name,$(given),$(eval override export $(name) := $$(value $(name))))
override export RECIPES_GIVEN := $(strip $(given))

train := sft dpo kto grpo reward ppo merge pipeline
data := choose plan check-data test-rewards distill preferences
results := chat serve report watch evaluate compare verify repro export push benchmark
machine := check models shell slurm slurm-status image setup
repository := test test-all test-docker test-slurm lint pin lock lock-check pin-base audit tiny samples clean

.PHONY: help $(train) $(data) $(results) $(machine) $(repository)
help $(train) $(data) $(results) $(machine) $(repository):
	@scripts/run $@

# The arguments of a command.
help-%:
	@scripts/run $* --help

# Any other name: scripts/run tells the nearest.
.DEFAULT:
	@scripts/run $@
