//! The number formats of `kernels/include/formats.cuh` against `core::num`, exhaustively.

use std::sync::Arc;

use fathom_core::num::{
    Ue8m0, e2m1_from_f32, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32, fp4_block_scale,
    fp8_block_scale, round_bf16,
};
use fathom_ops::cuda::{Arg, Buffer, Device, Launch};

use crate::process::{Emulator, MODES};

fn f32s(buffer: &Buffer) -> Vec<f32> {
    let bytes = buffer.read(0, buffer.len()).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn launch(device: &Arc<dyn Device>, kernel: &'static str, n: u32, args: &[Arg]) {
    let launch =
        Launch { kernel, grid: [n.div_ceil(128), 1, 1], block: [128, 1, 1], shared_bytes: 0, args };
    // SAFETY: the emulator checks every access itself.
    unsafe { device.launch(launch) }.unwrap();
}

/// Every bf16 value, and what lies around the ties between bf16 values.
fn inputs() -> Vec<f32> {
    (0..=0xffff_u32)
        .flat_map(|high| {
            [high << 16, high << 16 | 0x7fff, high << 16 | 0x8000, high << 16 | 0x8001]
        })
        .map(f32::from_bits)
        .collect()
}

#[test]
fn every_bf16_value_converts_as_on_the_cpu() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    let x = inputs();
    let n = x.len();
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let input = Buffer::from_bytes(&device, &bytes).unwrap();
    let outs = [1, 1, 2, 1, 1].map(|width| Buffer::new(&device, n * width).unwrap());
    let mut args = vec![Arg::Address(input.address())];
    args.extend(outs.iter().map(|out| Arg::Address(out.address())));
    args.push(Arg::U32(n as u32));
    launch(&device, "check_formats", n as u32, &args);
    let [e4m3, e2m1, rounded, fp8, fp4] = outs.map(|out| out.read(0, out.len()).unwrap());
    for (i, &x) in x.iter().enumerate() {
        assert_eq!(e4m3[i], e4m3_from_f32(x), "e4m3 of {x}");
        assert_eq!(e2m1[i], e2m1_from_f32(x), "e2m1 of {x}");
        let got = u32::from(u16::from_le_bytes([rounded[2 * i], rounded[2 * i + 1]])) << 16;
        let expected = round_bf16(x);
        assert!(f32::from_bits(got) == expected || x.is_nan(), "bf16 of {x}");
        if x.is_finite() {
            assert_eq!(fp8[i], fp8_block_scale(x.abs()).byte(), "fp8 scale of {x}");
            assert_eq!(fp4[i], fp4_block_scale(x.abs()).byte(), "fp4 scale of {x}");
        }
    }
}

#[test]
fn every_code_expands_to_its_value_at_its_place() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    // Every byte at each of the four places, its neighbours different.
    let codes: Vec<[u8; 4]> =
        (0..=255_u8).map(|c| [c, c.wrapping_add(85), c.wrapping_mul(3), !c]).collect();
    let n = codes.len();
    for scale in [0_u8, 1, 60, 120, 127, 128] {
        let input = Buffer::from_bytes(&device, codes.as_flattened()).unwrap();
        let outs = [4, 8, 4, 8].map(|values| Buffer::new(&device, 4 * values * n).unwrap());
        let mut args = vec![Arg::Address(input.address()), Arg::U32(u32::from(scale))];
        args.extend(outs.iter().map(|out| Arg::Address(out.address())));
        args.push(Arg::U32(n as u32));
        launch(&device, "check_expand", n as u32, &args);
        let [e4m3, e2m1, e4m3_scalar, e2m1_scalar] = outs.map(|out| f32s(&out));
        let factor = Ue8m0::from_exponent(i32::from(scale) - 127).to_f32();
        for (i, &code) in codes.as_flattened().iter().enumerate() {
            let expected = e4m3_to_f32(code);
            if !expected.is_nan() {
                assert_eq!(e4m3[i], expected, "e4m3 {code:#x}");
                assert_eq!(e4m3_scalar[i], expected, "e4m3 {code:#x}");
            }
            for half in 0..2 {
                let expected = e2m1_to_f32(code >> (4 * half)) * factor;
                assert_eq!(e2m1[2 * i + half], expected, "e2m1 {code:#x} times 2^{scale}-127");
                assert_eq!(e2m1_scalar[2 * i + half], expected, "e2m1 {code:#x}");
            }
        }
    }
}
