# System #1493: every setting keeps its default but two, which are measured by default. Needs the SP8192 set in ./data.
export GPTQ_RESERVE_SECONDS=12
export FIT_RULE=wider
# torchrun --standalone --nproc_per_node=8 train_gpt.py
