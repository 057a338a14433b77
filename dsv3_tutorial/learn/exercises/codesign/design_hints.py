"""What is said to a design that misses a demand: the arithmetic behind each number."""

SERVED = (
    "A user's cache takes 2 bytes x (kv_lora_rank + 64) x layers x context; without a latent, "
    "2 x 128 x num_key_value_heads in place of the bracket."
)
COUNTED = (
    "A token meets, in each layer, attention and (num_experts_per_tok + 1) experts of "
    "3 x hidden_size x moe_intermediate_size, and the output head once."
)
LAB_FLOP = (
    "Training takes about 6 x activated x tokens FLOP, and attention some more; eight H100s reach "
    "some 4e15 FLOP a second, so 14 days hold about 5e21."
)
H20_FLOP = (
    "Training takes about 6 x activated x tokens FLOP, and attention some more; an H20 reaches "
    "some 1e14 FLOP a second, and $560,000 rent 467,000 hours of one."
)
H20_SERVED = (
    "A step may take 1/30 s, and in it each GPU goes through the caches of 30 users: 30 x 32,768 "
    "x layers x heads x 2 x 1,088 FLOP on a latent, of which an H20 does 1.48e14 a second. How "
    "many heads are done in time, with room for the rest? At 20 heads (37 FLOP for each byte) "
    "reading takes as long; more are fine while the step keeps its time."
)
READ = (
    "A step reads the weights that its tokens meet and all their caches, and must be done within "
    "1 / (tokens/s) of a second."
)
SENT = "Each expert that a token meets on another GPU is a message there and back, in each layer."


def hints(served: str, flop: str) -> dict[str, str]:
    """What is said of each kind of demand that is missed."""
    held = {"memory": SERVED, "compute": served, "bandwidth": READ, "network": SENT}
    return {"size": COUNTED, "time": flop, **held}
