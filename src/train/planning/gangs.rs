//! Devices that divide every layer, for the planner: which they are, and what the machine of their gangs is.

use crate::error::Result;
use crate::plan::{Divided, Machine};
use crate::timeline::DeviceName;

/// The gangs of a machine's devices.
#[derive(Clone)]
pub(super) struct Gangs {
    /// What each member does.
    pub divided: Divided,
    /// The members of each gang, by the numbers of their devices.
    pub gangs: Vec<Vec<usize>>,
    /// The machine as it is.
    pub devices: Machine,
    /// Its devices, for people.
    pub names: Vec<DeviceName>,
    /// Bytes that devices may use beside what they have.
    pub budgets: Vec<Option<u64>>,
}

impl Gangs {
    /// Neighbours among these devices, or among all, of which each has its share of every layer.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a number of devices that does not make whole gangs.
    pub fn new(
        divided: Divided,
        devices: Machine,
        names: Vec<DeviceName>,
        chosen: Option<&[usize]>,
    ) -> Result<Gangs> {
        let all: Vec<usize> = chosen.map_or_else(|| (0..devices.devices.len()).collect(), <[usize]>::to_vec);
        divided.division.gangs(all.len(), "mesh.tensor")?;
        let count = divided.division.members();
        let gangs = all.chunks(count).map(<[usize]>::to_vec).collect();
        Ok(Gangs { divided, gangs, devices, names, budgets: Vec::new() })
    }

    /// The machine whose devices are the gangs.
    pub fn machine(&self) -> Machine {
        self.divided.machine(&self.devices, &self.gangs)
    }

    /// What the gangs are called.
    pub fn called(&self) -> Vec<DeviceName> {
        let name = |gang: &Vec<usize>| DeviceName::titles(gang.iter().map(|&device| &self.names[device]));
        DeviceName::list(self.gangs.iter().map(name))
    }

    /// Limits devices to so many bytes, by their numbers: what that is for each gang.
    pub fn limit(&mut self, mut budgets: Vec<Option<u64>>) -> Vec<Option<u64>> {
        budgets.resize(self.devices.devices.len(), None);
        self.budgets = budgets;
        let of = |gang: &Vec<usize>| self.divided.memory(gang.iter().map(|&device| self.budget(device)));
        self.gangs.iter().map(of).collect()
    }

    /// Bytes that a device may use.
    pub fn budget(&self, device: usize) -> Option<u64> {
        self.budgets.get(device).copied().flatten().or(self.devices.devices[device].memory)
    }
}
