// The process that the tests talk to: a device on standard input and output.
//
// Started as `emulator EAGER SEED`. Requests are a u32 code with its fields, little-endian:
//   1 allocate: u64 bytes                    -> u64 address
//   2 release:  u64 address
//   3 write:    u64 address, u64 n, n bytes
//   4 read:     u64 address, u64 n           -> n bytes
//   5 launch:   u32 n, name, u32 grid[3], block[3], u64 shared bytes, u32 dependent, u32 count,
//               count x (u32 n, n bytes)     -> u32 0
//   6 fill:     u64 address, u64 n, u32 byte
//   7 weights:  u64 address                  what is allocated there changes only while a model is loaded
// An error ends the process with status 3 and a line on standard error.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "state.h"

namespace {

void receive(void* p, size_t n) {
    if (fread(p, 1, n, stdin) != n) exit(0); // the test is done with this device
}
template <class T>
T take() {
    T x;
    receive(&x, sizeof x);
    return x;
}
void send(const void* p, size_t n) {
    if (fwrite(p, 1, n, stdout) != n) exit(2);
    fflush(stdout);
}

void launch() {
    std::string name(take<uint32_t>(), ' ');
    receive(name.data(), name.size());
    emu::launch.grid = take<emu::Dim3>();
    emu::launch.block = take<emu::Dim3>();
    emu::launch.shared_bytes = take<uint64_t>();
    const bool dependent = take<uint32_t>() != 0;
    struct alignas(128) Argument {
        char bytes[128];
    };
    std::vector<Argument> arguments(take<uint32_t>());
    std::vector<void*> pointers;
    for (Argument& argument : arguments) {
        const uint32_t n = take<uint32_t>();
        if (n > sizeof argument.bytes) exit(2);
        receive(argument.bytes, n);
        pointers.push_back(argument.bytes);
    }
    const emu::Kernel* kernel = emu::Kernel::find(name.c_str());
    if (!kernel) fprintf(stderr, "emulator: no kernel `%s`\n", name.c_str()), exit(3);
    emu::run_grid(*kernel, dependent, pointers.data());
    const uint32_t done = 0;
    send(&done, sizeof done);
}

} // namespace

#if defined(__SANITIZE_ADDRESS__)
// Looking for leaks at the end would take longer than most tests, and what is left is the devices' memory.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

int main(int argc, char** argv) {
    if (argc == 3) emu::mode = {atoi(argv[1]) != 0, static_cast<uint32_t>(atoi(argv[2]))};
    for (;;) {
        switch (take<uint32_t>()) {
        case 1: {
            const uint64_t address = emu::allocate(take<uint64_t>());
            send(&address, sizeof address);
            break;
        }
        case 2: emu::release(take<uint64_t>()); break;
        case 3: {
            const uint64_t address = take<uint64_t>();
            receive(reinterpret_cast<void*>(address), take<uint64_t>());
            break;
        }
        case 4: {
            const uint64_t address = take<uint64_t>();
            send(reinterpret_cast<void*>(address), take<uint64_t>());
            break;
        }
        case 5: launch(); break;
        case 6: {
            const uint64_t address = take<uint64_t>(), n = take<uint64_t>();
            memset(reinterpret_cast<void*>(address), static_cast<int>(take<uint32_t>()), n);
            break;
        }
        case 7: emu::hold_weights(take<uint64_t>()); break;
        default: fprintf(stderr, "emulator: a request it does not know\n"); return 2;
        }
    }
}
