"""Names that other tools give to our arguments, so that an unknown name is answered with ours."""

from collections.abc import Iterable

# In the words of LLaMA-Factory, axolotl, torchtune, Unsloth's notebooks, TRL, verl and OpenRLHF. A name may stand for
# several of ours: the first that the command has.
ALIASES = {
    "adapter": "adapter_name_or_path adapter_path lora lora_path lora_model_dir peft_model checkpoint",
    "beta": "kl_beta kl_coef kl_coeff dpo_beta pref_beta init_kl_coef",
    "card": "gpu gpu_type device",
    "chat_template_path": "chat_template template",
    "cliprange": "clip_range clip_ratio clip_eps eps_clip epsilon",
    "columns": "column_mapping field_mapping",
    "critic_learning_rate": "critic_lr value_lr",
    "data": "dataset datasets dataset_name dataset_path dataset_dir train_file train_data data_path data_files source "
    "prompts",
    "desirable_weight": "kto_chosen_weight lambda_d",
    "dtype": "bf16 fp16 torch_dtype precision",
    "epsilon": "clip_range clip_ratio clip_eps eps_clip cliprange",
    "eval_ratio": "val_size val_set_size test_size eval_split validation_split",
    "format": "dataset_format dataset_type prompt_style",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation accumulation_steps",
    "gradient_checkpointing": "enable_activation_checkpointing use_gradient_checkpointing",
    "kl_coef": "kl_beta beta kl_coeff init_kl_coef",
    "learning_rate": "lr",
    "load_in_4bit": "qlora load_4bit quantization quantize quantization_bit four_bit load_in_4_bit",
    "load_in_fp8": "fp8 load_fp8 load_in_float8",
    "logging_steps": "log_every_n_steps log_interval",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "lora_rank rank r",
    "lora_target_modules": "lora_target target_modules lora_modules",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
    "max_completion_length": "max_new_tokens max_tokens max_response_length response_length generate_max_len",
    "max_grad_norm": "grad_clip gradient_clip_val clip_grad_norm",
    "max_length": "cutoff_len sequence_len sequence_length seq_len max_seq_length max_seq_len block_size "
    "model_max_length context_length max_tokens",
    "max_new_tokens": "max_completion_length max_tokens max_response_length",
    "max_prompt_length": "prompt_length prompt_max_len",
    "max_steps": "steps max_iterations",
    "method": "recipe trainer",
    "missing_eos_penalty": "non_eos_penalty eos_penalty",
    "model": "model_name_or_path model_name model_path base_model pretrained pretrain checkpoint_dir",
    "num_generations": "group_size num_samples samples_per_prompt n_samples_per_prompt rollout_n generations",
    "num_train_epochs": "epochs num_epochs epoch train_epochs",
    "num_ppo_epochs": "ppo_epochs noptepochs",
    "optim": "optimizer",
    "output": "output_dir output_file output_path out_file",
    "output_dir": "output output_path run_name save_path name",
    "packing": "sample_packing pack",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size mini_batch_size "
    "micro_train_batch_size",
    "recipe": "method trainer",
    "report_to": "report logger wandb",
    "reward_model": "reward_model_path reward_pretrain reward_model_name_or_path rm",
    "rewards": "reward_funcs reward_functions reward_function reward_fn reward",
    "rollout_batch_size": "num_rollouts",
    "save_steps": "save_every_n_steps save_interval checkpoint_interval",
    "save_total_limit": "keep_checkpoints max_ckpt_num",
    "stages": "pipeline",
    "system_prompt": "system default_system",
    "time_limit": "time max_time",
    "undesirable_weight": "kto_rejected_weight lambda_u",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "weight_decay": "wd l2",
}  # fmt: skip

# Arguments that only some commands have, and why the others refuse them.
ELSEWHERE = {
    "load_in_fp8": "SFT, DPO, KTO and reward models train in fp8. GRPO and PPO sample in 16 bit or nf4, and fp8 rounds "
    "the activations too: the policy that samples would not be the one that is trained",
    "sharded": "SFT alone divides the model among GPUs. DPO and KTO switch the adapter off for their reference policy, "
    "GRPO and PPO sample, and a reward model has a head of its own, which a divided model was not shown to do right; "
    "a base in nf4 takes a quarter of the memory, with a copy on each card",
}


def ours(name: str, known: Iterable[str]) -> str | None:
    """The one of the `known` arguments that another tool calls `name`, None when none is."""
    name = name.lower().replace("-", "_")
    known = list(known)
    if name in known:  # under another case
        return name
    if name.startswith("args_") and f"{name[5:]}_args" in known:  # as they were called here before
        return f"{name[5:]}_args"
    return next((field for field, others in ALIASES.items() if name in others.split() and field in known), None)
