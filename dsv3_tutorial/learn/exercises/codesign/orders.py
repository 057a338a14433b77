"""What a decision is worth, taken away from all and added to none."""

from functools import cache

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

FIVE = ("a", "b", "c", "d", "e")


@cache
def alone(kept: frozenset) -> float:
    """Every decision saves a sum of its own: both orders say the same."""
    return 100.0 - sum({"mla": 8.0, "fp8": 20.0, "dualpipe": 5.0}[name] for name in kept)


@cache
def product(kept: frozenset) -> float:
    """Every decision divides the price: what is saved depends on what is there already."""
    price = 1000.0
    for name in sorted(kept):
        price /= {"mla": 1.1, "fp8": 1.8, "dualpipe": 1.25, "dedup": 2.0}[name]
    return price


@cache
def overlap(kept: frozenset) -> float:
    """Hidden communication: its size hardly matters while it is hidden."""
    compute = 10.0 if "fp8" in kept else 18.0
    network = 7.0 if "dedup" in kept else 15.0
    return max(compute, network) if "dualpipe" in kept else compute + network


@cache
def bad(kept: frozenset) -> float:
    """A decision that costs more than it saves, once another one is there."""
    return 50.0 - 6.0 * ("fp8" in kept) + 4.0 * ("mtp" in kept) + 3.0 * (len(kept) == 2)


@cache
def tangled(kept: frozenset) -> float:
    """Five decisions, each pair of which interacts."""
    places = [FIVE.index(name) + 1 for name in kept]
    return 300.0 - sum(place**2 for place in places) + 0.5 * sum(places) ** 1.5


def _case(price, decisions: tuple[str, ...]):
    return lambda: (price, decisions)


def _no_frozenset(error: BaseException, arguments: tuple) -> str | None:
    """After a set or list where a frozenset is needed, or a name on its own."""
    if isinstance(error, TypeError) and "unhashable" in str(error):
        return "price remembers what it was asked, so it needs a frozenset: frozenset(names)."
    if isinstance(error, KeyError | ValueError | TypeError):
        return (
            "price takes one frozenset of decisions' names. frozenset('mla') is a set of letters: "
            "write frozenset({'mla'}), or frozenset([name])."
        )
    return None


def _open(removal, addition):
    """`both_orders` with both differences open to be got wrong."""

    def orders(price, decisions):
        every, none = frozenset(decisions), frozenset()
        return {
            one: (
                removal(price, every, none, frozenset({one})),
                addition(price, every, none, frozenset({one})),
            )
            for one in decisions
        }

    return orders


def _removal(price, every, none, one):
    return price(every - one) - price(every)


def _addition(price, every, none, one):
    return price(none) - price(one)


def _cumulative(price, decisions):
    """One after the other, as a waterfall: each on top of those before it."""
    found, kept, left = {}, frozenset(), frozenset(decisions)
    for one in decisions:
        added = price(kept) - price(kept | {one})
        removed = price(left - {one}) - price(left)
        kept, left = kept | {one}, left - {one}
        found[one] = (removed, added)
    return found


BOTH_ORDERS = Exercise(
    name="codesign.both_orders",
    reference="dsv3_tutorial.cost.decisions:both_orders",
    cases=[
        Case("each saves its own sum", _case(alone, ("mla", "fp8", "dualpipe"))),
        Case("each divides the price", _case(product, ("mla", "fp8", "dualpipe", "dedup"))),
        Case("messages hidden behind arithmetic", _case(overlap, ("fp8", "dedup", "dualpipe"))),
        Case("one that costs", _case(bad, ("fp8", "mtp"))),
        Case("one decision", _case(alone, ("fp8",)), hidden=True),
        Case("fewer decisions", _case(overlap, ("dualpipe", "dedup")), hidden=True),
        Case("five", _case(tangled, FIVE), hidden=True),
    ],
    hints=[
        "Four prices make the two numbers: with all decisions, with all but this one, with none, "
        "with this one alone. Each is price(frozenset(...)).",
        "Removal: price(every - {one}) - price(every), what giving it up costs. every is "
        "frozenset(decisions).",
        "Addition: price(frozenset()) - price(frozenset({one})), what it saves by itself.",
    ],
    difficulty=2,
    importance=5,
    minutes=6,
    lines=5,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "removal twice",
            _open(_removal, _removal),
            "Both numbers are the removal: added, the decision stands alone, with no other.",
        ),
        Mutant(
            "addition twice",
            _open(_addition, _addition),
            "Both numbers are the addition: a removal leaves all the others in place.",
        ),
        Mutant(
            "turned",
            _open(_addition, _removal),
            "The two are swapped: removal first, then addition.",
        ),
        Mutant(
            "removal's sign",
            _open(lambda *a: -_removal(*a), _addition),
            "The removal has the wrong sign: positive if the price rises without the decision.",
        ),
        Mutant(
            "addition's sign",
            _open(_removal, lambda *a: -_addition(*a)),
            "The addition has the wrong sign: positive if the decision makes it cheaper.",
        ),
        Mutant(
            "both signs",
            _open(lambda *a: -_removal(*a), lambda *a: -_addition(*a)),
            "Both signs are turned: a decision that saves money is worth something positive.",
        ),
        Mutant(
            "prices",
            _open(
                lambda price, every, none, one: price(every - one),
                lambda price, every, none, one: price(one),
            ),
            "These are prices: return how far each is from the one to compare it with.",
        ),
        Mutant(
            "to the other end",
            _open(
                lambda price, every, none, one: price(every - one) - price(none),
                lambda price, every, none, one: price(every) - price(one),
            ),
            "Removal is compared with having all decisions, addition with having none.",
        ),
        Mutant(
            "without it, from none",
            _open(_removal, lambda price, every, none, one: price(none) - price(every - one)),
            "The addition prices all others together: it is about the decision alone.",
        ),
        Mutant(
            "a waterfall",
            _cumulative,
            "Decisions pile up here in the order they are listed: start anew for each of them.",
        ),
        Mutant(
            "shares",
            _open(
                lambda *a: _removal(*a) / a[0](a[1]),
                lambda *a: _addition(*a) / a[0](a[2]),
            ),
            "These are shares of a price: return differences.",
        ),
    ],
    raised=_no_frozenset,
)
