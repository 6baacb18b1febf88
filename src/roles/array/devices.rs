//! The ublk devices of this machine: which array each one shows, and what to do with those that a dead daemon has left.
//!
//! A device of dst carries a number that is made of its array's id ([`tag`]); the kernel keeps it. One whose daemon is dead waits, with
//! every request of whoever uses it, until its array is started again, or it is deleted.

use crate::control::command::Refusal;
use crate::control::device::{Device, DeviceState};
use crate::control::status::{ArrayStatus, State};
use crate::errno::Errno;
use crate::io::ublk::{self, Leftover, UblkError};
use crate::units::Id;

/// The number that the ublk device of an array carries.
pub fn tag(array: Id) -> u32 {
    crc32c::crc32c(&array.0)
}

/// All devices, with the arrays among these that they show.
pub fn list(arrays: &[ArrayStatus]) -> Result<Vec<Device>, Refusal> {
    let known = ublk::devices().map_err(|error| refused(&error))?;
    Ok(known.iter().map(|(device, served)| shown(device, *served, arrays)).collect())
}

/// Removes a device that a dead daemon has left; refused while it is in use, unless `force`.
pub fn delete(arrays: &[ArrayStatus], id: u32, force: bool) -> Result<Device, Refusal> {
    let known = ublk::devices().map_err(|error| refused(&error))?;
    let Some((leftover, served)) = known.into_iter().find(|(device, _)| device.id == id) else {
        let text = format!("there is no device {id} of dst: 'dst device list' shows those there are");
        return Err(Refusal::new(Errno::ENOENT, text));
    };
    let device = shown(&leftover, served, arrays);
    let array = arrays.iter().find(|array| device.array.as_deref() == Some(&array.name));
    match (device.state, array) {
        (DeviceState::Served, _) => {
            let array = device.array.as_deref().unwrap_or("ARRAY");
            let pid = device.pid.unwrap_or(0);
            let text = format!("{} is served by process {pid}: 'dst stop {array}' takes it out of use", device.path);
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        (_, Some(array)) if !matches!(array.state, State::Stopped | State::Failed) => {
            let text = format!(
                "{} waits for array '{}', which is {}: 'dst stop {} --force' gives both up",
                device.path,
                array.name,
                array.state.word(),
                array.name
            );
            return Err(Refusal::new(Errno::EBUSY, text));
        }
        _ => {}
    }
    remove(leftover, force).map_err(|error| refused(&error))?;
    Ok(device)
}

/// Removes a dead daemon's device; refused while it is in use, unless `force`: then its requests end with EIO.
pub fn remove(leftover: Leftover, force: bool) -> Result<(), UblkError> {
    let name = format!("ublkb{}", leftover.id);
    if !force && leftover.live {
        let failed = |error| UblkError::Refused { step: format!("opening /dev/{name}"), errno: Errno::from(&error) };
        if let Some(used) = ublk::in_use(&name).map_err(failed)? {
            return Err(UblkError::InUse(used));
        }
    }
    ublk::delete_leftover(leftover)
}

fn shown(device: &Leftover, served: Option<u32>, arrays: &[ArrayStatus]) -> Device {
    let own = |array: &&ArrayStatus| array.spec.as_ref().is_some_and(|spec| tag(spec.id) == device.owner);
    let state = match served {
        Some(_) => DeviceState::Served,
        None if device.live => DeviceState::Waiting,
        None => DeviceState::Dead,
    };
    Device {
        id: device.id,
        path: format!("/dev/ublkb{}", device.id),
        array: arrays.iter().find(own).map(|array| array.name.clone()),
        state,
        pid: served,
        queues: device.queues,
        depth: device.depth,
    }
}

fn refused(error: &UblkError) -> Refusal {
    Refusal::new(error.errno(), error.to_string())
}
