"""The recommendations that no number of ours can price: what is asked, where, and what is missing.

A price needs a size that is printed or a model that notices the change. These lack one or both.
"""

UNPRICED = (
    (
        "Priorities for the kinds of traffic on NVLink and PCIe; a card in the I/O die",
        "ISCA 4.5.2",
        "what tokens and caches lose to each other on a shared bus is nowhere measured",
    ),
    (
        "A card with several ports and planes behind one queue, placing data out of order",
        "ISCA 5.1",
        "table 4 finds one step as long on both networks (0.1 %); the gain is in failures and cost",
    ),
    (
        "Adaptive routing, spraying, congestion control, queues for each pair",
        "ISCA 5.2.2, 6.3",
        "our links are free when asked for; figure 8's loss is drawn, and its numbers not printed",
    ),
    (
        "GPUs of all makers that ring the card's bell themselves (IBGDA)",
        "ISCA 5.2.3",
        "no time with and without is printed; the latencies of table 5 are the CPU's",
    ),
    (
        "Checks for silent errors, tools that find them, links that mend themselves",
        "ISCA 6.1, 6.3",
        "no rate of failures is printed; `nothing lost` says what a lost share costs",
    ),
    (
        "CPU cores above 4 GHz, enough of them, and 1 TB/s of memory for each node",
        "ISCA 6.2",
        "we count no work of the CPU; a step that waits for it is lesson 6's first section",
    ),
    (
        "Optics beside the chip",
        "ISCA 6.3",
        "a saving of power and a longer reach; neither is printed for the links we count",
    ),
    (
        "Systems on a wafer",
        "ISCA 6.6",
        "a direction without a size: memory and links of one such machine would be another chip",
    ),
    (
        "Synchronisation in hardware, beyond the fence",
        "ISCA 4.4.2, 6.4",
        "what waiting on flags costs an SM is nowhere measured",
    ),
    (
        "Products that read transposed from shared memory",
        "report 3.5.2",
        "counted inside `fused quantisation`: its second layout is what a transposed read saves",
    ),
)
