"""Train a LongSpec draft for a target, in the three stages of the paper (LongSpec, arXiv 2502.17421, section 3.2).

Data come from `examples/generate_data.py`, from text files or from a Hugging Face dataset. Each stage is one command:

1. Short texts, anchor-offset positions up to the target's context length::

    python examples/train_draft.py --stage short --target embedded --tokens data/corpus.npy "data/own.npy*4" \
        --draft_vocab_size 16384 --output_dir runs/short --bf16 --max_steps 10000 --per_device_train_batch_size 20

2. Long texts, plain positions, from the draft of stage 1::

    python examples/train_draft.py --stage long --target embedded --tokens data/corpus.npy --draft runs/short \
        --output_dir runs/long --bf16 --max_steps 1000 --per_device_train_batch_size 4

3. Long outputs of the target (chains of thought), plain positions, from the draft of stage 2::

    python examples/train_draft.py --stage outputs --target embedded --tokens data/long_own.npy --draft runs/long \
        --output_dir runs/final --bf16 --max_steps 500 --per_device_train_batch_size 4

`--max_train_seconds` ends a stage by the clock, with its learning rate run down. `--resume_from_checkpoint` goes on
after an interruption. `--tau_texts` (from `examples/evaluate_tau.py generate`) measures tau at every evaluation. Every
field of `LongSpecTrainingArguments` is an option. `longspec-hf train` is the same command for an installed package.
"""

from longspec_hf.training.run import main

if __name__ == "__main__":
    main()
