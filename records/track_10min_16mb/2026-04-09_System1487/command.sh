# System #1487 as published. It trains on text before scoring it: its result cannot be a record.
# Model
export NUM_LOOPS=1
export MAX_SKIPS=5
export PARALLEL_RESIDUAL_FORM=lanes
export VE_DIM=128
# Training
export LOADER=coprime
export EMBED_WD=0.095
export WARMDOWN_FRAC=0.667
export ENABLE_LOOPING_AT_STEP=3000
export PREQUANT_TTT_EPOCHS=10
# Quantization and artifact
export GPTQ_RESERVE_SECONDS=10
export EMBED_QUANTIZER=nearest
export SCALE_FLOOR=1
export FIT_RULE=prune
# Evaluation
export TTT_ENABLED=0
# torchrun --standalone --nproc_per_node=8 train_gpt.py
