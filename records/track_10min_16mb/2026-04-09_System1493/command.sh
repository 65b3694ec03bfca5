# System #1493: the defaults, but with a fixed reserve and without tighter ranges. Needs the SP8192 set in ./data.
export GPTQ_RESERVE_SECONDS=12
export FIT_RULE=wider
# torchrun --standalone --nproc_per_node=8 train_gpt.py
