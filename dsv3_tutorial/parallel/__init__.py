"""Running a model on many ranks, each scheme equal to one process in loss and every gradient.

launch (and launch_*)     a function on N local ranks, from a notebook or a script
mesh, data, replicas      which rank holds what; joining torchrun; gradients, ZeRO-1, FSDP2
tensor (and tensor_*)     heads and features split; split: the same for one MLP, to be read
expert, route, dispatch, exchange, counts   experts split; who sends which rows to whom
stage, pipeline (and pipeline_*)            layers split; schedules run as cost/ counts them
rings, gradients          all-reduce from messages; what ranks owe each other in a step
traffic, clock, calls, collectives          every byte seen by tier, and a virtual clock
"""
