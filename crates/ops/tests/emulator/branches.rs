//! Branches: what wrongly relies on the order of the two sides is seen in one of the modes.

use fathom_ops::cuda::{Arg, Buffer, Device, DeviceError, Launch};

use crate::process::{Emulator, MODES};

const N: usize = 128;

fn round(device: &dyn Device, from: &Buffer, to: &Buffer) -> Result<(), DeviceError> {
    let args: [Arg; 3] = [from.into(), to.into(), (N as u32).into()];
    let launch = Launch {
        kernel: "act_quant_grid",
        grid: [1; 3],
        block: [256, 1, 1],
        shared_bytes: 0,
        args: &args,
    };
    // SAFETY: both buffers hold N bf16 values.
    unsafe { device.launch(launch) }
}

/// Whether `x -> y` on one side and `y -> z` on the other brings x to z, in each mode.
fn arrives(main_writes: bool) -> Option<Vec<bool>> {
    let mut outcomes = Vec::new();
    for mode in MODES {
        let device = Emulator::start(mode)?;
        let x = Buffer::from_bytes(&device, &[0x3f; 2 * N]).unwrap();
        let [y, z, rounded] = [(); 3].map(|()| Buffer::from_bytes(&device, &[0; 2 * N]).unwrap());
        round(&*device, &x, &rounded).unwrap();
        let pairs = [(&x, &y), (&y, &z)];
        let (side, main) = if main_writes { (pairs[1], pairs[0]) } else { (pairs[0], pairs[1]) };
        device.fork().unwrap();
        round(&*device, side.0, side.1).unwrap();
        device.back().unwrap();
        round(&*device, main.0, main.1).unwrap();
        device.join().unwrap();
        outcomes.push(z.read(0, 2 * N).unwrap() == rounded.read(0, 2 * N).unwrap());
    }
    Some(outcomes)
}

#[test]
fn one_side_has_what_the_other_makes_only_in_some_modes() {
    let eager = MODES.map(|mode| mode.eager);
    // What the branch makes is there for the other side only if it runs at once ...
    let Some(arrived) = arrives(false) else { return };
    assert_eq!(arrived, eager);
    // ... and it sees what the other side makes only if it runs late.
    let Some(arrived) = arrives(true) else { return };
    assert_eq!(arrived, eager.map(|eager| !eager));
}

#[test]
fn branches_do_not_nest_and_nothing_is_copied_while_one_is_open() {
    let Some(device) = Emulator::start(MODES[0]) else { return };
    let x = Buffer::from_bytes(&device, &[0; 2 * N]).unwrap();
    assert!(device.back().is_err() && device.join().is_err());
    device.fork().unwrap();
    assert!(device.fork().unwrap_err().to_string().contains("open already"));
    let refused = device.read(x.address(), &mut [0; 4]).unwrap_err();
    assert!(refused.to_string().contains("while a branch is open"), "{refused}");
    device.back().unwrap();
    assert!(device.back().is_err());
    device.join().unwrap();
    assert_eq!(x.read(0, 4).unwrap(), [0; 4]);
}
