// Fibres and the order in which they run: a grid cluster by cluster, a cluster warp by warp.
//
// Seed 0 runs warps in ascending order, any other seed in an order drawn anew each round.
// When no thread can run, one asynchronous copy lands; when there is none either, the table of what
// each waits for is the error message.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "sanitizers.h"
#include "state.h"

namespace emu {

Thread* current;
Launch launch;
Mode mode;
Cluster cluster;

namespace {

constexpr size_t STACK = 128 * 1024, GUARD = 4096;
const Kernel* first_kernel;
std::vector<void*> stacks; // each with a guard page below
void* scheduler_stack;
const void* scheduler_bottom; // of its stack
size_t scheduler_bytes;
const Kernel* running;
void** running_arguments;
uint32_t random_state = 1;

} // namespace

Kernel::Kernel(const char* name, void (*run)(void**), std::vector<uint32_t> sizes, Options options)
    : name(name), run(run), sizes(std::move(sizes)), options(options), next(first_kernel) {
    first_kernel = this;
}
const Kernel* Kernel::find(const char* name) {
    for (const Kernel* k = first_kernel; k; k = k->next)
        if (!strcmp(k->name, name)) return k;
    return nullptr;
}

uint32_t random_below(uint32_t n) {
    random_state ^= random_state << 13, random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state % n;
}

#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif
// Saves the callee-saved registers on the running stack and continues on another.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

void yield() {
    void* own = nullptr;
    before_switch(self().state == State::done ? nullptr : &own, scheduler_bottom, scheduler_bytes);
    emu_switch(&current->stack_pointer, scheduler_stack);
    after_switch(own, &scheduler_bottom, &scheduler_bytes);
}

namespace {

void resume(Fibre& fibre) {
    void* own = nullptr;
    before_switch(&own, fibre.stack, STACK);
    emu_switch(&scheduler_stack, fibre.stack_pointer);
    after_switch(own, nullptr, nullptr);
}

void fibre_main() {
    after_switch(nullptr, &scheduler_bottom, &scheduler_bytes);
    running->run(running_arguments);
    Fibre& fibre = self();
    copies_at_exit(fibre);
    tensor_accesses_at_exit(fibre);
    fibre.state = State::done;
    barriers_at_exit(fibre);
    yield();
    abort(); // a finished thread is never continued
}

void* stack_at(size_t index) {
    while (stacks.size() <= index) {
        char* p = static_cast<char*>(mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (p == MAP_FAILED || mprotect(p, GUARD, PROT_NONE)) perror("stack"), exit(2);
        stacks.push_back(p + GUARD);
    }
    return stacks[index];
}

// Thread `index` of the block with this rank in the cluster.
void prepare(Fibre& fibre, uint32_t index, uint32_t rank, Dim3 block_id) {
    const Dim3 size = launch.block;
    const uint32_t at = rank * size.x * size.y * size.z + index;
    fibre.thread = {index % size.x, index / size.x % size.y, index / size.x / size.y};
    fibre.block_id = block_id;
    fibre.index = index, fibre.rank = rank;
    fibre.warp = at / LANES, fibre.lane = at % LANES;
    fibre.state = State::ready;
    fibre.fences = 0, fibre.waits_for = nullptr;
    fibre.in_cluster_barrier = fibre.has_waited_for_launch = fibre.tensor_fenced = fibre.tensor_touched = false;
    fibre.open_group.clear(), fibre.groups.clear();
    // The switch pops six registers and returns to `fibre_main`, with the stack as after a call.
    char* stack = static_cast<char*>(stack_at(at));
    permit(stack, STACK); // whoever ended there has left its frames
    fibre.stack = stack;
    void** top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fibre_main);
    fibre.stack_pointer = top - 6;
    memset(fibre.stack_pointer, 0, 6 * sizeof(void*));
}

[[noreturn]] void deadlock() {
    fflush(stdout);
    fprintf(stderr, "emulator: %s: no thread can go on\n", cluster.kernel);
    static const char* const names[] = {"ready",        "in an operation of its warp",
                                        "in an operation of its warpgroup",
                                        "at a barrier", "at a barrier in shared memory",
                                        "at the cluster's barrier", "finished"};
    for (size_t w = 0; w < cluster.warps.size(); ++w) {
        uint32_t counts[7] = {};
        const Mbarrier* waits_for = nullptr;
        for (uint32_t l = 0; l < LANES; ++l) {
            const Fibre& fibre = cluster.fibres[w * LANES + l];
            counts[static_cast<int>(fibre.state)]++;
            if (fibre.state == State::in_mbarrier) waits_for = fibre.waits_for;
        }
        fprintf(stderr, "  block %u warp %u:", cluster.fibres[w * LANES].rank,
                cluster.fibres[w * LANES].index / LANES);
        for (int s = 0; s < 7; ++s)
            if (counts[s]) fprintf(stderr, " %u lanes %s", counts[s], names[s]);
        if (waits_for) describe(*waits_for);
        fprintf(stderr, "\n");
    }
    _exit(3);
}

void run_cluster(Dim3 first_block) {
    const uint32_t n_threads = launch.block.x * launch.block.y * launch.block.z;
    const uint32_t n_warps = n_threads / LANES * launch.cluster;
    cluster.fibres.resize(n_threads * launch.cluster);
    cluster.warps.assign(n_warps, Warp());
    cluster.groups.assign((n_warps + GROUP_WARPS - 1) / GROUP_WARPS, Group());
    cluster.blocks.assign(launch.cluster, Block());
    for (uint32_t w = 0; w < n_warps; ++w) {
        cluster.warps[w].clock.assign(n_warps + 1, 0);
        cluster.warps[w].clock[w] = 1;
    }
    memory_start(launch.shared_bytes);
    mbarriers_start();
    products_start();
    tensor_memory_start();
    cluster_start();
    for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
        cluster.blocks[rank].live = n_threads;
        for (uint32_t i = 0; i < n_threads; ++i)
            prepare(cluster.fibres[rank * n_threads + i], i, rank,
                    {first_block.x + rank, first_block.y, first_block.z});
    }
    std::vector<uint32_t> order(n_warps);
    for (uint32_t w = 0; w < n_warps; ++w) order[w] = w;
    for (;;) {
        bool progressed = false, alive = false;
        if (mode.seed)
            for (uint32_t i = order.size(); i > 1; --i)
                std::swap(order[i - 1], order[random_below(i)]);
        for (uint32_t w : order)
            for (uint32_t l = 0; l < LANES; ++l) {
                Fibre& fibre = cluster.fibres[w * LANES + l];
                if (fibre.state == State::ready) {
                    current = &fibre;
                    resume(fibre);
                    progressed = true;
                }
                alive |= fibre.state != State::done;
            }
        current = nullptr;
        if (!alive) break;
        if (!progressed && !land_one()) deadlock();
    }
    if (const size_t n = bulk_copies_under_way()) FAIL("ends with %zu bulk copies on their way", n);
    products_at_exit();
    tensor_memory_at_exit();
    dependencies_at_exit();
}

} // namespace

void run_grid(const Kernel& kernel, bool dependent, void** arguments) {
    running = &kernel, running_arguments = arguments;
    cluster.kernel = kernel.name, cluster.options = kernel.options;
    cluster.options.dependent |= dependent;
    launch.cluster = kernel.options.cluster;
    const uint32_t n_threads = launch.block.x * launch.block.y * launch.block.z;
    if (n_threads == 0 || n_threads > 1024 || n_threads % LANES) FAIL("%u threads in a block: whole warps, 1024 at most", n_threads);
    if (launch.grid.x % launch.cluster || launch.cluster > MAX_CLUSTER)
        FAIL("a grid of %u blocks in clusters of %u", launch.grid.x, launch.cluster);
    random_state = mode.seed ? mode.seed * 2654435761u | 1 : 1;
    for (uint32_t z = 0; z < launch.grid.z; ++z)
        for (uint32_t y = 0; y < launch.grid.y; ++y)
            for (uint32_t x = 0; x < launch.grid.x; x += launch.cluster) run_cluster({x, y, z});
}

void fail_at(void* pc, const char* format, ...) {
    fflush(stdout);
    fprintf(stderr, "emulator: %s", cluster.kernel);
    if (current) {
        const Dim3 b = current->block_id;
        fprintf(stderr, ", block (%u, %u, %u), thread %u", b.x, b.y, b.z, current->index);
    }
    fprintf(stderr, ": ");
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    // The line in the kernel, where the tool for it is installed. This may be a library or a program.
    Dl_info file = {};
    char command[4096];
    if (dladdr(pc, &file))
        snprintf(command, sizeof command, "addr2line -ie '%s' %#zx >&2 2>/dev/null", file.dli_fname,
                 static_cast<char*>(pc) - 1 - static_cast<char*>(file.dli_fbase));
    if (!file.dli_fname || system(command)) fprintf(stderr, "  at %p\n", pc);
    _exit(3); // other threads may be at work: nothing is taken down
}

} // namespace emu
