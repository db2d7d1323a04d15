"""`python -m xla.finetune DATA ...`: finetuning and the pruning tasks by fairseq-train's own flags, on torch-xla."""

from xla.launch import main

if __name__ == "__main__":
    main("finetune")
