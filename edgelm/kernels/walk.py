"""The native half of the executor: threads walk an op table, sharing out the units of each row.

Each thread has a part of the units of a row, the same at each run, and takes half of what is left of it again and
again: so it reads one long stream of weights, as prefetching wants it. When nothing is left it takes from the parts of
others. No thread ever waits for another to arrive, only for units of work to be finished: a thread that the system has
taken away holds up at most the units it has claimed. While a thread waits, it loads the weights that it will need next.

Every word that threads share is tagged with the generation of the run (`tag << UNIT_BITS | count`), so nothing has to
be reset between runs, and a thread that comes late from a run that is over finds every row taken. Method:
self-scheduling with decreasing chunks (Polychronopoulos & Kuck 1987), from a queue for each thread (Markatos & LeBlanc
1994, affinity scheduling).

Knows nothing of Python objects: `executor` owns the memory and the threads. All functions have the signature of a
kernel, so that `compiler.address` serves them too.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelm.kernels.abi import Env, Row
from edgelm.kernels.executor import (
    DONE,
    IDLE,
    JOB_ENV,
    JOB_N_OUTPUTS,
    JOB_N_ROWS,
    JOB_N_THREADS,
    JOB_N_TOKENS,
    JOB_SLOTS,
    JOB_TABLE,
    LINE,
    SLEEP,
    SLEEP_TIME,
    SLOTS,
    SPINS,
    SPINS_PER_US,
    TAKEN,
    TICKET,
    UNIT_BITS,
    WORKER,
    WORKER_LAST,
    WORKER_PARKED,
    WORKER_STOPPED,
    WORKERS,
    YIELD,
    YIELDS,
)

FETCH_LINES = 8  # of memory, between two looks at whether a wait is over
FETCH_BYTES = 128 << 10  # at most, of a row before its turn: a part of a second-level cache
CACHE_LINE = 64
I64 = ir.IntType(64)
UNIT_MASK = (1 << UNIT_BITS) - 1
ROW_BYTES = 8 * Row.SIZE
OP_KERNEL, OP_UNITS, OP_UNITS_PER, OP_COUNT, OP_GRAIN, OP_BARRIER, OP_READS, OP_READ_BYTES = (
    8 * field for field in (
        Row.KERNEL, Row.UNITS, Row.UNITS_PER, Row.COUNT, Row.GRAIN, Row.BARRIER, Row.READS, Row.READ_BYTES
    )
)
COUNTS_TOKENS, ENV_N_TOKENS, ENV_N_OUTPUTS = int(Env.N_TOKENS), 8 * Env.N_TOKENS, 8 * Env.N_OUTPUTS


def _word(b, address):
    return b.inttoptr(address, I64.as_pointer())


@intrinsic
def get(typingctx, address):
    """Plain load of the word at `address`."""
    def codegen(context, b, sig, args):
        return b.load(_word(b, args[0]), align=8)
    return types.int64(types.int64), codegen


@intrinsic
def atomic_get(typingctx, address):
    def codegen(context, b, sig, args):
        return b.load_atomic(_word(b, args[0]), "seq_cst", 8)
    return types.int64(types.int64), codegen


@intrinsic
def atomic_set(typingctx, address, value):
    def codegen(context, b, sig, args):
        b.store_atomic(args[1], _word(b, args[0]), "seq_cst", 8)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@intrinsic
def compare_exchange(typingctx, address, expected, value):
    """Stores `value` if the word is `expected`; returns what was there before."""
    def codegen(context, b, sig, args):
        pair = b.cmpxchg(_word(b, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return b.extract_value(pair, 0)
    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def touch(typingctx, address):
    """Loads the byte at `address` and does nothing with it: its cache line is there afterwards."""
    def codegen(context, b, sig, args):
        value = b.zext(b.load(b.inttoptr(args[0], ir.IntType(8).as_pointer())), I64)
        b.asm(ir.FunctionType(ir.VoidType(), [I64]), "", "r", [value], side_effect=True)
        return context.get_dummy_value()
    return types.void(types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tells the core that this is a spin loop."""
    def codegen(context, b, sig, args):
        machine = context.codegen().magic_tuple()[0].split("-")[0]
        if machine == "x86_64":
            name, parameters = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            name, parameters = "llvm.aarch64.hint", [ir.IntType(32)(1)]  # yield
        else:
            return context.get_dummy_value()
        fn = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [p.type for p in parameters]), name
        )
        b.call(fn, parameters)
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def call_kernel(typingctx, kernel, op, env, begin, end):
    def codegen(context, b, sig, args):
        fn = ir.FunctionType(ir.VoidType(), [I64] * 4)
        b.call(b.inttoptr(args[0], fn.as_pointer()), args[1:])
        return context.get_dummy_value()
    return types.void(*[types.int64] * 5), codegen


@intrinsic
def call_with(typingctx, function, argument):
    """Calls a C function of one machine word (or fewer: the callee ignores what it does not take)."""
    def codegen(context, b, sig, args):
        fn = ir.FunctionType(ir.VoidType(), [I64])
        b.call(b.inttoptr(args[0], fn.as_pointer()), args[1:])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@njit(inline="always")
def units_of(op, n_tokens, n_outputs):
    units, per = get(op + OP_UNITS), get(op + OP_UNITS_PER)
    if per == 0:
        return units
    count = n_tokens if get(op + OP_COUNT) == COUNTS_TOKENS else n_outputs
    return units * ((count + per - 1) // per)


@njit
def relax(control, n):
    """What a thread does the n-th time that it finds nothing new: spin, then give the core away, then sleep."""
    spins = get(control + SPINS)
    if n < spins:
        pause()
    elif n < spins + get(control + YIELDS):
        call_with(get(control + YIELD), 0)
    else:
        call_with(get(control + SLEEP), get(control + SLEEP_TIME))


@njit
def wait_for_work(control, n):
    """One step of about a microsecond: what an idle worker does before it parks."""
    if n & 15 == 15:
        call_with(get(control + YIELD), 0)
    for _ in range(get(control + SPINS_PER_US)):
        pause()


@njit
def report(done, generation, mine):
    """Adds `mine` to the finished units of a group of rows."""
    word = atomic_get(done)
    while mine > 0:
        count = word & UNIT_MASK if word >> UNIT_BITS == generation else 0
        seen = compare_exchange(done, word, generation << UNIT_BITS | (count + mine))
        if seen == word:
            return
        word = seen


@njit
def begin_of(op, units, part, n_parts):
    """Where a thread's part of the units of a row begins: whole grains, parts as equal as these allow."""
    grain = get(op + OP_GRAIN)
    grains = (units + grain - 1) // grain
    return min(units, (grains * part + n_parts - 1) // n_parts * grain)


@njit
def next_reader(table, i, n_rows):
    """The first row from `i` on that reads constants, or `n_rows`."""
    while i < n_rows and get(table + i * ROW_BYTES + OP_READS) == 0:
        i += 1
    return i


@njit
def reads_of(op, units, part, n_parts):
    """[start, end) of the constants that a thread's part of a row reads first. Nothing, if it reads them repeatedly."""
    if units != get(op + OP_UNITS):
        return 0, 0
    start, size = get(op + OP_READS), get(op + OP_READ_BYTES)
    end = start + size * begin_of(op, units, part + 1, n_parts)
    start += size * begin_of(op, units, part, n_parts)
    return start, min(end, start + FETCH_BYTES)


@njit
def fetch(start, end):
    """Loads a few lines of memory into the caches of this core; where to go on.

    By loads, which a processor may not drop, as it does requests: see docs/LOG.md.
    """
    stop = min(end, start + FETCH_LINES * CACHE_LINE)
    while start < stop:
        touch(start)
        start += CACHE_LINE
    return start


@njit
def wait(control, done, generation, goal, start, end):
    """Waits until `goal` units of a group of rows are finished, and fetches [start, end) meanwhile; how far it came.

    -1: the run is over.
    """
    n = 0
    while True:
        word = atomic_get(done)
        if word == generation << UNIT_BITS | goal:
            return start
        if word >> UNIT_BITS > generation:
            return -1
        if start < end:
            start = fetch(start, end)
        else:
            relax(control, n)
            n += 1


@njit
def work(op, slot, env, me, n_threads, units, generation):
    """Takes units of a row, from this thread's part and then from the others', until none are left; how many.

    -1: the run is over.
    """
    grain, mine = get(op + OP_GRAIN), 0
    for k in range(n_threads):
        part = (me + k) % n_threads
        last, taken = begin_of(op, units, part + 1, n_threads), slot + TAKEN + LINE * part
        word = atomic_get(taken)
        while True:
            begin = begin_of(op, units, part, n_threads)
            if word >> UNIT_BITS == generation:
                begin = word & UNIT_MASK
            elif word >> UNIT_BITS > generation:
                return -1
            if begin >= last:
                break
            share = (last - begin) // 2
            end = min(begin + max(1, (share + grain - 1) // grain) * grain, last)
            seen = compare_exchange(taken, word, generation << UNIT_BITS | end)
            if seen == word:
                call_kernel(get(op + OP_KERNEL), op, env, begin, end)
                mine += end - begin
                word = atomic_get(taken)
            else:
                word = seen
    return mine


@njit
def walk(control, slots, table, n_rows, env, me, n_threads, n_tokens, n_outputs, generation):
    """One thread's share of a run. Returns when all units of all rows are finished, or when the run is over."""
    mine = goal = 0  # units of the current group of rows: finished by this thread, and in all
    reader, start, end = -1, 0, 0  # the next row that reads constants, and those that are not fetched yet
    for i in range(n_rows):
        op, slot = table + i * ROW_BYTES, slots + i * (TAKEN + LINE * n_threads)
        units = units_of(op, n_tokens, n_outputs)
        goal += units
        if units > 0:
            n = work(op, slot, env, me, n_threads, units, generation)
            if n < 0:
                return
            mine += n
        if get(op + OP_BARRIER) == 0 and i < n_rows - 1:
            continue
        if goal > 0:
            report(slot + DONE, generation, mine)
            if reader <= i:
                reader = next_reader(table, i + 1, n_rows)
                start = end = 0
                if reader < n_rows:
                    op = table + reader * ROW_BYTES
                    start, end = reads_of(op, units_of(op, n_tokens, n_outputs), me, n_threads)
            start = wait(control, slot + DONE, generation, goal, start, end)
            if start < 0:
                return
        mine = goal = 0


def spin(n, unused, unused2, unused3):
    """`n` pauses, to be timed."""
    for _ in range(n):
        pause()


def run_alone(table, env, n_rows, unused):
    """All rows on the calling thread."""
    n_tokens, n_outputs = get(env + ENV_N_TOKENS), get(env + ENV_N_OUTPUTS)
    for i in range(n_rows):
        op = table + i * ROW_BYTES
        units = units_of(op, n_tokens, n_outputs)
        if units > 0:
            call_kernel(get(op + OP_KERNEL), op, env, 0, units)


def run(control, table, env, size):
    """All rows, shared with the workers that are awake. size = n_threads << 32 | n_rows; table 0 stops the workers."""
    n_rows, n_threads = size & 0xFFFFFFFF, size >> 32
    n_tokens = n_outputs = 0
    if table != 0:
        n_tokens, n_outputs = get(env + ENV_N_TOKENS), get(env + ENV_N_OUTPUTS)
    ticket = get(control + TICKET)  # only this thread writes it: the executor holds a lock
    atomic_set(control + TICKET, ticket + 1)  # odd: the job is being written
    atomic_set(control + JOB_TABLE, table)
    atomic_set(control + JOB_ENV, env)
    atomic_set(control + JOB_N_ROWS, n_rows)
    atomic_set(control + JOB_N_THREADS, n_threads)
    atomic_set(control + JOB_N_TOKENS, n_tokens)
    atomic_set(control + JOB_N_OUTPUTS, n_outputs)
    slots = get(control + SLOTS)
    atomic_set(control + JOB_SLOTS, slots)
    atomic_set(control + TICKET, ticket + 2)
    if table != 0:
        walk(control, slots, table, n_rows, env, 0, n_threads, n_tokens, n_outputs, (ticket + 2) >> 1)


def serve(control, worker, unused, unused2):
    """The life of a worker until there has been nothing to do for a while: then it marks itself parked and returns.

    Who looks for the mark after it has published a job sees it, or this thread sees the job: both accesses are seq_cst.
    `_Crew.stop` does so. Before a run it is looked for first, so that who marks itself in between misses that run.
    """
    me = control + WORKERS + worker * WORKER
    atomic_set(me + WORKER_PARKED, 0)
    last = get(me + WORKER_LAST)
    n = 0
    while True:
        ticket = atomic_get(control + TICKET)
        if ticket == last or ticket & 1:
            if n < get(control + IDLE):
                wait_for_work(control, n)
                n += 1
                continue
            atomic_set(me + WORKER_PARKED, 1)
            if atomic_get(control + TICKET) == last:
                return
            atomic_set(me + WORKER_PARKED, 0)
            n = 0
            continue
        n = 0
        table, env = atomic_get(control + JOB_TABLE), atomic_get(control + JOB_ENV)
        n_rows, n_threads = atomic_get(control + JOB_N_ROWS), atomic_get(control + JOB_N_THREADS)
        n_tokens, n_outputs = atomic_get(control + JOB_N_TOKENS), atomic_get(control + JOB_N_OUTPUTS)
        slots = atomic_get(control + JOB_SLOTS)
        if atomic_get(control + TICKET) != ticket:
            continue  # the job changed while it was read
        last = ticket
        atomic_set(me + WORKER_LAST, last)
        if table == 0:
            atomic_set(me + WORKER_STOPPED, 1)
            return
        if worker + 1 < n_threads:
            walk(control, slots, table, n_rows, env, worker + 1, n_threads, n_tokens, n_outputs, ticket >> 1)
