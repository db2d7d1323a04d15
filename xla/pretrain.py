"""`python -m xla.pretrain DATA ...`: masked LM pretraining by fairseq-train's own flags, on torch-xla."""

from xla.launch import main

if __name__ == "__main__":
    main("pretrain")
