# System #1493: every setting keeps its default. Needs the SP8192 set in ./data.
# torchrun --standalone --nproc_per_node=8 train_gpt.py
