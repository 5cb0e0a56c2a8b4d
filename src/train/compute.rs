//! In what numbers each device multiplies matrices: `train.compute`.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gpu::{Capabilities, Device};
use crate::ops::verify::matmuls_are_right;

/// `"f32"`, `"f16"`, or a list with one of them for each device, by number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Compute {
    /// All alike.
    All(String),
    /// Each device.
    Each(Vec<String>),
}

impl Default for Compute {
    fn default() -> Self {
        Compute::All("f32".into())
    }
}

impl Compute {
    /// What is wrong with it, if anything is.
    pub(super) fn mistake(&self) -> Option<String> {
        let names = match self {
            Compute::All(name) => std::slice::from_ref(name),
            Compute::Each(names) => names,
        };
        if names.is_empty() {
            return Some(
                "train.compute = [] names nothing; write \"f32\", \"f16\" or one of them for each device"
                    .into(),
            );
        }
        let stranger = names.iter().find(|name| !["f32", "f16"].contains(&name.as_str()))?;
        Some(format!(
            "train.compute = {stranger:?} is not known; write \"f32\", \"f16\" or a list with one of them for each device"
        ))
    }

    /// Refuses a list for another number of devices.
    ///
    /// # Errors
    /// [`Error::Config`] in one line.
    pub fn check(&self, devices: usize) -> Result<()> {
        match self {
            Compute::Each(names) if names.len() != devices => {
                let message =
                    format!("is for {} devices, and there are {devices}; give one for each", names.len());
                Err(Error::config("train.compute", message))
            }
            _ => Ok(()),
        }
    }

    /// As such devices are to be kept in a config, where these are their numbers from now on.
    pub fn of(devices: &[Device]) -> Compute {
        let name = |device: &Device| if device.capabilities().f16 { "f16" } else { "f32" }.to_string();
        let names: Vec<String> = devices.iter().map(name).collect();
        match names.first() {
            Some(first) if names.iter().all(|name| name == first) => Compute::All(first.clone()),
            Some(_) => Compute::Each(names),
            None => Compute::default(),
        }
    }

    /// The same devices, each with its number, computing as this says.
    ///
    /// # Errors
    /// [`Error::Config`] for a device without f16 that is to compute in it, and for a list that does not have a device.
    pub fn apply(&self, devices: impl IntoIterator<Item = (usize, Device)>) -> Result<Vec<Device>> {
        let mut computing = Vec::new();
        for (number, device) in devices {
            let name = match self {
                Compute::All(name) => Some(name),
                Compute::Each(names) => names.get(number),
            };
            let Some(name) = name else {
                let message = format!(
                    "says nothing of device {number} ({}); give as many as there are devices",
                    device.info().name
                );
                return Err(Error::config("train.compute", message));
            };
            computing.push(match name.as_str() {
                "f16" => in_f16(number, &device)?,
                _ => device,
            });
        }
        Ok(computing)
    }
}

fn in_f16(number: usize, device: &Device) -> Result<Device> {
    let info = device.info();
    if !info.f16 {
        let message = format!(
            "device {number} ({}) has no f16; write \"f32\" for it in a list, such as [\"f16\", \"f32\"]",
            info.name
        );
        return Err(Error::config("train.compute", message));
    }
    Ok(device.with(Capabilities { f16: true, ..*device.capabilities() }))
}

/// The device without its cooperative matrices, if it would use them and they give wrong results.
///
/// # Errors
/// Those of the device.
pub async fn without_wrong_matrices(device: &Device) -> Result<Option<Device>> {
    let capabilities = *device.capabilities();
    if !capabilities.f16
        || capabilities.cooperative == 0
        || capabilities.software
        || matmuls_are_right(device).await?
    {
        return Ok(None);
    }
    Ok(Some(device.with(Capabilities { cooperative: 0, ..capabilities })))
}
