# Sample_CPU: what differs from the defaults.
export SMOKE=1
export DATA_PATH=../../../data/sample
export TOKENIZER_PATH=../../../data/sample/tokenizer.model
# python train_gpt.py
