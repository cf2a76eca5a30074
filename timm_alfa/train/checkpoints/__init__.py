"""What a checkpoint holds, and going on from one."""
