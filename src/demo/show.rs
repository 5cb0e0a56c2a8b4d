//! What a model can do by now: sums that it has never seen, or some text.

use super::report::{Example, Shown};
use super::{Session, Task};
use crate::error::Result;
use crate::generate::{Extent, Generator, Sampling};
use crate::ops::parameters::Part;
use crate::pipeline::Executor;

/// Questions that the page shows.
const EXAMPLES: usize = 8;
/// Texts that are begun, and with what.
const BEGUN: [&str; 3] = ["The ", "A ", "It "];

impl Session {
    /// Asks the model what it was not taught, or lets it write.
    ///
    /// # Errors
    /// Those of [`Generator::run`].
    pub async fn show(&mut self) -> Result<Shown> {
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
        let writes = self.settings.task == Task::Text;
        let prompts: Vec<Vec<u32>> = match writes {
            true => BEGUN.iter().map(|text| bytes(text)).collect(),
            false => self.lesson.held_out.iter().map(|record| bytes(&record.question)).collect(),
        };
        let longest = self.planning.config.model.context;
        let answer = self.lesson.held_out.iter().map(|record| record.answer.len()).max();
        let count = answer.unwrap_or(longest);
        let generator = match &mut self.generator {
            Some(generator) => generator,
            none => {
                let prompt = prompts.iter().map(Vec::len).max().unwrap_or(0);
                let extent = Extent { texts: prompts.len(), prompt, tokens: prompt + count };
                let budgets = vec![None; self.devices.len()];
                none.insert(Generator::launch(&self.model, extent, &self.devices, budgets)?)
            }
        };
        renew(generator, self.trainer.executor()).await?;
        let temperature = if writes { 0.7 } else { 0.0 };
        let sampling = Sampling { temperature, top_k: 0, top_p: 1.0, seed: self.settings.seed.into() };
        let texts = generator.run(&prompts, count, sampling, 256, |_, _| true).await?;
        let said = texts.iter().zip(&prompts).map(|(text, prompt)| {
            let bytes = text[if writes { 0 } else { prompt.len() }..].iter().map(|&token| token as u8);
            String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
        });
        let said: Vec<String> = said.collect();
        let shown = Shown::nothing(self.trainer.step_number());
        if writes {
            return Ok(Shown { text: said.join("\n"), ..shown });
        }
        let held_out = &self.lesson.held_out;
        let right = held_out.iter().zip(&said).filter(|(record, said)| record.answer == **said).count();
        let task = self.settings.task;
        let example = |(record, said): (&super::task::Record, &String)| Example {
            question: task.asked(&record.question),
            answer: task.readable(said),
            right: task.readable(&record.answer),
        };
        let asked = held_out.len();
        let accuracy = (asked > 0).then(|| right as f64 / asked as f64);
        let examples = held_out.iter().zip(&said).take(EXAMPLES).map(example).collect();
        Ok(Shown { examples, accuracy, asked, ..shown })
    }
}

/// Gives a generator the weights that the model has now.
async fn renew(generator: &mut Generator, trained: &mut Executor) -> Result<()> {
    generator.forget();
    let names: Vec<String> =
        trained.parameters().iter().filter(|p| p.tied_to.is_none()).map(|p| p.name.clone()).collect();
    for name in names {
        let values = trained.read(&name, Part::Weight).await?;
        generator.executor().write(&name, Part::Weight, &values).await?;
    }
    Ok(())
}

impl Shown {
    fn nothing(step: u64) -> Shown {
        Shown { step, text: String::new(), examples: Vec::new(), accuracy: None, asked: 0 }
    }
}
