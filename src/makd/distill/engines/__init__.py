"""Station 7: students and teachers in many processes: what DDP, FSDP2 and DeepSpeed are told, and what is refused."""
