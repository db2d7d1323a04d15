"""fairseq-train on torch-xla: `python -m xla.pretrain`, `python -m xla.finetune`, and `python -m xla.pod` for the hosts
of a TPU pod."""
