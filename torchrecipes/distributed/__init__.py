"""Several processes: starting them, what they exchange, and how a model is sharded over them.

collectives   numbers and objects exchanged by the ranks on the host
fsdp          `parallelize`: ddp, fsdp and hsdp over `fully_shard`
launch        starts the processes of a run on this node and watches them
error_file    how a process reports why it ended
"""
