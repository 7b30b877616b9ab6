//! Every message of the emulator with a kernel whose planted error it is, and a test that none is missing.
//!
//! What each detector must find in every mode, and leave alone, is in `planted`, `planted90` and
//! `planted100`; here a message counts as seen when one of the modes gives it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fathom_ops::cuda::{Arg, Buffer, Device, Launch, MapElement, Swizzle, TensorMapSpec};

use crate::process::{Emulator, MODES};

/// What the kernels of a file, or a part of one, take.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Takes {
    /// `planted.cu`
    Floats,
    /// `planted90.cu`
    Codes,
    /// `planted100.cu`: a tensor map, codes, scales
    Pipeline,
    /// `planted100.cu`: what threads store
    Stored,
    /// `planted100.cu`: tensor maps of 8-bit and of 4-bit values
    Maps,
}

/// A message as the emulator's source has it, and who gives it.
#[derive(Debug, Clone, Copy)]
struct Planted {
    message: &'static str,
    kernel: &'static str,
    takes: Takes,
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
}

impl Planted {
    const fn new(takes: Takes, kernel: &'static str, message: &'static str) -> Self {
        let (blocks, threads, shared_bytes) = match takes {
            Takes::Floats => (1, 64, 512),
            Takes::Codes => (4, 256, 20 * 1024),
            Takes::Pipeline | Takes::Maps => (1, 192, 40 * 1024),
            Takes::Stored => (1, 160, 10 * 1024),
        };
        Self { message, kernel, takes, blocks, threads, shared_bytes }
    }
    const fn with_threads(self, threads: u32) -> Self {
        Self { threads, ..self }
    }
    const fn with_blocks(self, blocks: u32) -> Self {
        Self { blocks, ..self }
    }
    const fn with_shared_bytes(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    /// What the emulator says, in each mode; nothing without a compiler.
    fn outcomes(&self) -> impl Iterator<Item = String> {
        MODES.into_iter().map_while(|mode| {
            let device: Arc<dyn Device> = Emulator::start_as(mode, "sm_100f")?;
            let zeros = |bytes: usize| Buffer::from_bytes(&device, &vec![0; bytes]).unwrap();
            let (buffers, maps) = match self.takes {
                Takes::Floats => (vec![zeros(512), zeros(256)], vec![]),
                Takes::Codes => {
                    (vec![zeros(1 << 15).for_weights().unwrap(), zeros(4096), zeros(2048)], vec![])
                }
                Takes::Stored => (vec![zeros(2048), zeros(8192), zeros(16384)], vec![]),
                Takes::Pipeline => {
                    (vec![zeros(4096), zeros(512), zeros(4096)], vec![MapElement::U8])
                }
                Takes::Maps => (vec![], vec![MapElement::U8, MapElement::Padded4]),
            };
            let mapped = zeros(4 * 128 * 128);
            let map = |element: MapElement| {
                let columns = if element == MapElement::U8 { 128 } else { 256 };
                let spec = TensorMapSpec {
                    element,
                    address: mapped.address(),
                    dims: &[columns, 4 * 128],
                    strides: &[128],
                    box_dims: &[128, 128],
                    swizzle: Swizzle::B128,
                };
                Arg::Map(device.encode(&spec).unwrap())
            };
            let args: Vec<Arg> =
                maps.into_iter().map(map).chain(buffers.iter().map(Arg::from)).collect();
            let launch = Launch {
                kernel: self.kernel,
                grid: [self.blocks, 1, 1],
                block: [self.threads, 1, 1],
                shared_bytes: self.shared_bytes,
                args: &args,
            };
            // SAFETY: the emulator checks every access itself.
            let result = unsafe { device.launch(launch) };
            Some(result.map_or_else(|error| error.to_string(), |()| "no error".to_owned()))
        })
    }
}

/// Whether `said` holds the texts between the values of `message`, in their order.
fn agrees(said: &str, message: &str) -> bool {
    let conversions = ["%#x", "%zu", "%u", "%s"];
    let texts = conversions.iter().fold(message.to_owned(), |text, c| text.replace(c, "\0"));
    let mut rest = said;
    texts.split('\0').all(|text| {
        let found = rest.find(text);
        rest = found.map_or("", |at| &rest[at + text.len()..]);
        found.is_some()
    })
}

/// In one of the modes each kernel gives the message planted for it.
fn all_are_given(planted: &[Planted]) {
    for planted in planted {
        let said: Vec<String> = planted.outcomes().collect();
        let is_given =
            |said: &String| said.contains(planted.kernel) && agrees(said, planted.message);
        assert!(said.is_empty() || said.iter().any(is_given), "{planted:?}: {said:#?}");
    }
}

#[test]
fn messages_about_threads_memory_and_launches_are_given() {
    all_are_given(OF_EVERY_ARCHITECTURE);
}

#[test]
fn messages_about_barriers_copies_clusters_and_products_are_given() {
    all_are_given(OF_HOPPER);
}

#[test]
fn messages_about_tensor_memory_are_given() {
    all_are_given(OF_BLACKWELL);
}

/// The messages in a source of the emulator: the first text in a call of `FAIL` or `fail_at`, and what is
/// printed after a kernel's name.
fn messages_in(source: &str) -> Vec<String> {
    let after_name = |at: usize| &source[at..];
    let calls = ["FAIL(", "fail_at("].into_iter().flat_map(|call| {
        source.match_indices(call).filter_map(move |(at, _)| {
            let rest = &source[at..];
            let start = rest.find(['"', ';', '{'])?;
            rest[start..].starts_with('"').then_some(at + start)
        })
    });
    let printed = source.match_indices("\"emulator: %s: ").map(|(at, text)| at + text.len() - 1);
    let literal = |start: usize| {
        // Neighbouring literals are one.
        let (mut text, mut rest) = (String::new(), after_name(start + 1));
        while let Some((part, after)) = rest.split_once('"') {
            text += part;
            match after.trim_start().strip_prefix('"') {
                Some(next) => rest = next,
                None => break,
            }
        }
        text.trim_end_matches("\\n").to_owned()
    };
    calls.chain(printed).map(literal).collect()
}

#[test]
fn every_message_has_a_planted_error() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels/emulator");
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cpp") {
            for message in messages_in(&std::fs::read_to_string(&path).unwrap()) {
                *times.entry(message).or_default() += 1;
            }
        }
    }
    assert!(times.len() > 90, "{times:?}");
    for (message, times) in &times {
        assert_eq!(*times, 1, "two places say: {message}");
    }
    let tables = [OF_EVERY_ARCHITECTURE, OF_HOPPER, OF_BLACKWELL];
    let planted: Vec<&str> = tables.concat().iter().map(|planted| planted.message).collect();
    for message in times.keys() {
        assert!(planted.contains(&message.as_str()), "no error is planted for: {message}");
    }
    for message in planted {
        assert!(times.contains_key(message), "the emulator does not say: {message}");
    }
}

#[rustfmt::skip]
const OF_EVERY_ARCHITECTURE: &[Planted] = {
    const fn p(kernel: &'static str, message: &'static str) -> Planted {
        Planted::new(Takes::Floats, kernel, message)
    }
    &[
        p("planted_deadlock", "no thread can go on"),
        p("planted_sound", "%u threads in a block: whole warps, 1024 at most").with_threads(48),
        p("planted_sound", "%zu bytes of shared memory; no block has more than 232448").with_shared_bytes(228 * 1024),
        p("planted_sound", "uses %zu bytes of shared memory, launched with %zu").with_shared_bytes(256),
        // Accesses.
        p("planted_store_behind", "%s of %zu bytes ends %zu bytes behind a buffer of %zu bytes"),
        p("planted_nowhere", "%s of %zu bytes outside of every buffer"),
        p("planted_misaligned", "%zu bytes at an address that is no multiple of it"),
        p("planted_shared_behind", "%s of %zu bytes at shared offset %zu, the block has %zu"),
        p("planted_not_shared", "an address that is not in shared memory"),
        p("planted_unwritten", "load of shared offset %zu, which was never written"),
        p("planted_atomic_on_unwritten", "atomic on shared offset %zu, which was never written"),
        p("planted_reuse_race", "race at shared offset %zu: %s, unordered after a %s by warp %u lane %u"),
        p("planted_misaligned_copy", "cp.async of %u bytes at an address that is no multiple of it"),
        p("planted_copies_in_flight", "ends with %zu copies on their way"),
        p("planted_misaligned_rows", "ldmatrix: a row must begin at a multiple of 16"),
        // Warps and barriers.
        p("planted_half_barrier", "divergent warp: %s here, lane %u is at a barrier"),
        p("planted_absent_lane", "divergent warp: %s here, lane %u has ended"),
        p("planted_two_operations", "divergent warp: %s here, other lanes are in %s"),
        p("planted_late_half", "divergent warp: barrier %u here, lane %u is not on its way there"),
        p("planted_two_barriers", "divergent warp: barrier %u here, lane %u is at barrier %u"),
        p("planted_two_counts", "barrier %u for %u threads, others wait there for %u"),
        p("planted_early_exit", "ends while lane %u of its warp waits"),
    ]
};

#[rustfmt::skip]
const OF_HOPPER: &[Planted] = {
    const fn p(kernel: &'static str, message: &'static str) -> Planted {
        Planted::new(Takes::Codes, kernel, message)
    }
    &[
        // Barriers in shared memory.
        p("planted90_misaligned_barrier", "a barrier at an address that is no multiple of 8"),
        p("planted90_not_made", "barrier at shared offset %u is used before it is initialised"),
        p("planted90_made_twice", "barrier at shared offset %u is initialised twice"),
        p("planted90_made_for_nobody", "a barrier for %u arrivals"),
        p("planted90_one_more", "barrier at shared offset %u: one arrival more than the %u it was made for"),
        p("planted90_two_phases", "barrier at shared offset %u completes a phase before %u threads have seen the last one"),
        // Copies.
        p("planted90_no_init_fence", "a copy counts on the barrier at shared offset %u, whose initialisation was not fenced"),
        p("planted90_misaligned_bulk_copy", "a bulk copy of %u bytes: size and addresses must be multiples of 16"),
        p("planted90_bulk_copy_in_flight", "ends with %zu bulk copies on their way"),
        p("planted90_copy_over_store",
          "an asynchronous copy to shared offset %zu, stored to by warp %u lane %u without fence_proxy_async"),
        p("planted90_unawaited_copy", "race at shared offset %zu: %s, unordered after an asynchronous copy"),
        p("planted90_misaligned_prefetch", "a prefetch of %u bytes: length and address must be multiples of 16"),
        // Clusters.
        p("planted90_ring", "a grid of %u blocks in clusters of %u").with_blocks(3),
        p("planted90_others_memory", "a plain access to the shared memory of block %u of the cluster"),
        p("planted90_no_such_block", "shared memory of block %u; the cluster has %zu"),
        p("planted90_ring_ended", "shared memory of block %u, which has ended"),
        p("planted90_two_arrivals", "arrives twice at the cluster's barrier without waiting"),
        p("planted90_no_arrival", "waits at the cluster's barrier without having arrived"),
        // Registers.
        p("planted90_too_few_registers", "%u registers: 24 to 256 in steps of 8"),
        p("planted90_too_many_registers", "the warps of the block ask for %u registers; there are 65536").with_threads(384),
        p("planted90_unequal_registers", "%u registers, another warp of the warpgroup has %u"),
        // Products.
        p("planted90_divergent_group", "%s in a block of %u threads: no whole warpgroups").with_threads(64),
        p("planted90_divergent_group", "divergent warpgroup: %s here, other threads are in %s"),
        p("planted90_no_wgmma_fence", "wgmma without wgmma_fence since the last commit"),
        p("planted90_disagreement", "the threads of a warpgroup disagree on a product"),
        p("planted90_changed_registers", "registers of A change before the product is waited for"),
        p("planted90_product_in_flight", "ends with products of a warpgroup that were never waited for"),
        p("planted90_no_swizzle", "a matrix without 128-byte swizzle"),
        p("planted90_base_offset", "a matrix with a base offset: begin it at a multiple of 1024"),
        p("planted90_unwritten_product", "a tensor core reads shared offset %zu, which was never written"),
        p("planted90_no_proxy_fence",
          "a tensor core reads shared offset %zu, stored by warp %u lane %u without fence_proxy_async"),
        // Launches that overlap.
        p("planted90_stored_weight", "stores to weights, which the launch after it may read any time"),
        p("planted90_early_store", "stores before it has waited for the launch before it"),
        p("planted90_early_load", "loads what is no weight before it has waited for the launch before it"),
        p("planted90_unawaited", "a block ends without having waited for the launch before it"),
    ]
};

#[rustfmt::skip]
const OF_BLACKWELL: &[Planted] = {
    const fn pipeline(kernel: &'static str, message: &'static str) -> Planted {
        Planted::new(Takes::Pipeline, kernel, message)
    }
    const fn p(kernel: &'static str, message: &'static str) -> Planted {
        Planted::new(Takes::Stored, kernel, message)
    }
    const fn copy(kernel: &'static str, message: &'static str) -> Planted {
        Planted::new(Takes::Maps, kernel, message)
    }
    &[
        copy("planted100_other_rank", "a tensor copy of %u dimensions, the map has %u"),
        copy("planted100_misaligned_tensor_copy",
             "a tensor copy with %u-byte swizzle to a shared address that is no multiple of %u"),
        copy("planted100_half_columns", "a tensor copy of 4-bit values from column %u: no multiple of 128"),
        // Columns.
        p("planted100_not_allocated", "tensor memory is used before any was allocated"),
        pipeline("planted100_other_columns", "column %u of tensor memory is not allocated"),
        pipeline("planted100_odd_columns", "%u columns of tensor memory: a power of two from 32 to 512"),
        p("planted100_second_allocation", "no %u columns of tensor memory are free"),
        p("planted100_other_width", "%u columns of tensor memory at %#x were not allocated so"),
        pipeline("planted100_no_dealloc", "ends without giving back its tensor memory"),
        p("planted100_busy_dealloc", "tensor memory is given back while tensor cores work"),
        // Accesses of threads.
        pipeline("planted100_other_lanes", "warp %u reads lanes %u on of tensor memory"),
        p("planted100_unequal_places", "the lanes of a warp name different places of tensor memory"),
        p("planted100_unwritten_columns", "load of column %u of tensor memory, which was never written"),
        p("planted100_load_unwaited", "load of column %u of tensor memory, stored without tmem_store_wait"),
        p("planted100_load_race", "%s of column %u of tensor memory, unordered after a store by warp %u"),
        p("planted100_store_race", "store of column %u of tensor memory, unordered after a load by warp %u"),
        p("planted100_early_commit", "%s of column %u of tensor memory, unordered after the product that writes it"),
        p("planted100_changed_operand", "store of column %u of tensor memory, unordered after the product that reads it"),
        pipeline("planted100_no_fence", "%s without tmem_fence_after since the last wait"),
        p("planted100_no_fence_before", "a barrier without tmem_fence_before since the last access to tensor memory"),
        pipeline("planted100_no_load_wait", "ends with loads of tensor memory that were never waited for"),
        p("planted100_stores_in_flight", "ends with stores to tensor memory that were never waited for"),
        // Products on what threads stored.
        p("planted100_no_store_wait", "a product uses column %u of tensor memory, stored without tmem_store_wait"),
        p("planted100_no_fence_after",
          "a product uses column %u of tensor memory, which threads stored, without tmem_fence_after"),
        p("planted100_operand_race", "race at column %u of tensor memory: used, unordered after a store by warp %u"),
        p("planted100_sums_race", "race at column %u of tensor memory: written, unordered after a load by warp %u"),
        pipeline("planted100_no_scales", "a product reads column %u of tensor memory, which was never written"),
        p("planted100_adds_to_nothing", "a product adds to column %u of tensor memory, which was never written"),
        p("planted100_uncommitted", "ends with work of tensor cores that was never committed"),
        p("planted100_commit_to_nobody",
          "barrier at shared offset %u: a commit is one arrival more than the %u it was made for"),
        // What products there are.
        p("planted100_wrong_swizzle", "a matrix with layout %u, expected %u"),
        pipeline("planted100_wrong_layout", "a matrix descriptor that is not of this architecture"),
        p("planted100_base_offset", "a matrix descriptor with a base offset: begin the matrix at a multiple of 1024"),
        p("planted100_wrong_shape", "a scaled product of %u x %u"),
        p("planted100_wrong_format", "a scaled product of formats %u and %u"),
        p("planted100_wrong_scales", "scales must be E8M0"),
        p("planted100_wrong_field", "fields of a scaled product's kind that must be zero: %#x"),
        p("planted100_wrong_lane", "a scaled product begins at lane 0, and so do its scales"),
        p("planted100_scales_in_a_lane", "scales are copied to lane 0 on, not to lane %u"),
        p("planted100_odd_width", "a bf16 product of %u x %u"),
        p("planted100_wrong_type", "a product that is not of bf16 with f32 sums: %#x"),
        p("planted100_wrong_bf16_field", "fields of a bf16 product's kind that must be zero: %#x"),
        p("planted100_wrong_sums", "a product of %u rows at lane %u"),
        p("planted100_upper_rows", "a product of rows from lane %u on, with sums from lane %u on"),
    ]
};
