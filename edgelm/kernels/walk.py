"""The native half of the executor: threads walk an op table, sharing out the units of each row.

No thread ever waits for another to arrive, only for units of work to be finished: a thread that the system has taken
away holds up at most the units it has claimed. Every word that threads share is tagged with the generation of the run
(`tag << UNIT_BITS | count`), so nothing has to be reset between runs, and a thread that comes late from a run that is
over finds every row taken. Method: self-scheduling with decreasing chunks (Polychronopoulos & Kuck 1987).

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
    SLEEP,
    SLEEP_TIME,
    SLOT,
    SLOTS,
    SPINS,
    SPINS_PER_US,
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

I64 = ir.IntType(64)
UNIT_MASK = (1 << UNIT_BITS) - 1
ROW_BYTES = 8 * Row.SIZE
OP_KERNEL, OP_UNITS, OP_UNITS_PER, OP_COUNT, OP_GRAIN, OP_BARRIER = (
    8 * field for field in (Row.KERNEL, Row.UNITS, Row.UNITS_PER, Row.COUNT, Row.GRAIN, Row.BARRIER)
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
def wait(control, done, generation, goal):
    """Waits until `goal` units of a group of rows are finished. False: the run is over."""
    n = 0
    while True:
        word = atomic_get(done)
        if word == generation << UNIT_BITS | goal:
            return True
        if word >> UNIT_BITS > generation:
            return False
        relax(control, n)
        n += 1


@njit
def walk(control, slots, table, n_rows, env, n_threads, n_tokens, n_outputs, generation):
    """One thread's share of a run. Returns when all units of all rows are finished, or when the run is over."""
    tag = generation << UNIT_BITS
    mine = goal = 0  # units of the current group of rows: finished by this thread, and in all
    for i in range(n_rows):
        op, slot = table + i * ROW_BYTES, slots + i * SLOT
        units = units_of(op, n_tokens, n_outputs)
        goal += units
        if units > 0:
            grain = get(op + OP_GRAIN)
            word = atomic_get(slot)
            while True:
                begin = 0
                if word >> UNIT_BITS == generation:
                    begin = word & UNIT_MASK
                elif word >> UNIT_BITS > generation:
                    return
                if begin >= units:
                    break
                share = (units - begin) // (2 * n_threads)
                end = begin + max(1, (share + grain - 1) // grain) * grain
                end = min(end, units)
                seen = compare_exchange(slot, word, tag | end)
                if seen == word:
                    call_kernel(get(op + OP_KERNEL), op, env, begin, end)
                    mine += end - begin
                    word = atomic_get(slot)
                else:
                    word = seen
        if get(op + OP_BARRIER) != 0 or i == n_rows - 1:
            if goal > 0:
                report(slot + DONE, generation, mine)
                if not wait(control, slot + DONE, generation, goal):
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
        walk(control, slots, table, n_rows, env, n_threads, n_tokens, n_outputs, (ticket + 2) >> 1)


def serve(control, worker, unused, unused2):
    """The life of a worker until there has been nothing to do for a while: then it marks itself parked and returns.

    Whoever publishes a job afterwards sees the mark, or this thread sees the job: both accesses are seq_cst.
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
            walk(control, slots, table, n_rows, env, n_threads, n_tokens, n_outputs, ticket >> 1)
