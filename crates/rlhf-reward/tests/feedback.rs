//! Feedback: scripted sessions, crashes, which questions to ask.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::TokenMean;
use rlhf_models::data::{PreferencePair, read_jsonl};
use rlhf_reward::core::{Completions, Preference};
use rlhf_reward::feedback::{
    AskOptions, Choice, End, FeedbackLog, Question, Recovery, SessionReport, ask, most_informative,
};
use rlhf_reward::{Combination, HeadEnsemble};

fn questions() -> Vec<Question> {
    (0..5)
        .map(|i| Question {
            prompt: format!("Question {i}?"),
            answers: [format!("first {i}"), format!("second {i}")],
        })
        .collect()
}

const OPTIONS: AskOptions = AskOptions { seed: 3, width: 40 };

/// Plays a session; returns what was shown too.
fn play(path: &Path, script: &str) -> (SessionReport, String) {
    let mut log = FeedbackLog::open(path).unwrap();
    let mut shown = Vec::new();
    let report = ask(
        &questions(),
        &mut log,
        &mut script.as_bytes(),
        &mut shown,
        OPTIONS,
    );
    (report.unwrap(), String::from_utf8(shown).unwrap())
}

/// `(prompt, chosen)` of every preference in the file, as a trainer reads it.
fn preferences(path: &Path) -> Vec<(String, String)> {
    let pairs = read_jsonl::<PreferencePair>(path).unwrap_or_default();
    pairs.into_iter().map(|p| (p.prompt, p.chosen)).collect()
}

/// What stood on the left of each question that was shown.
fn lefts(shown: &str) -> Vec<&str> {
    shown
        .lines()
        .filter(|line| line.starts_with("first") || line.starts_with("second"))
        .map(|line| line.split('|').next().unwrap().trim())
        .collect()
}

#[test]
fn a_scripted_session_is_what_the_trainers_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/feedback.jsonl");
    let (report, shown) = play(&path, "l\nRIGHT\nwhat?\nt\n s \nl\n");
    let lefts = lefts(&shown);
    assert_eq!(
        report,
        SessionReport {
            end: End::AllAnswered,
            answered: 5,
            left: 0
        }
    );
    let chosen = preferences(&path);
    let other = |left: &str, i: usize| match left.starts_with("first") {
        true => format!("second {i}"),
        false => format!("first {i}"),
    };
    assert_eq!(
        chosen,
        [
            ("Question 0?".to_string(), lefts[0].to_string()),
            ("Question 1?".to_string(), other(lefts[1], 1)),
            ("Question 4?".to_string(), lefts[4].to_string()),
        ]
    );
    let undecided = std::fs::read_to_string(dir.path().join("new/feedback.undecided.jsonl"));
    let undecided = undecided.unwrap();
    assert_eq!(undecided.lines().count(), 2);
    assert!(undecided.contains("\"tie\"") && undecided.contains("\"skip\""));
    // Nothing is asked twice.
    let (report, shown) = play(&path, "l\n");
    assert_eq!((report.answered, shown.as_str()), (0, ""));
}

#[test]
fn sides_are_random_but_stay() {
    let dir = tempfile::tempdir().unwrap();
    let many: Vec<_> = (0..60)
        .map(|i| Question {
            prompt: format!("{i}"),
            answers: [format!("first {i}"), format!("second {i}")],
        })
        .collect();
    let shown = |name: &str| {
        let mut log = FeedbackLog::open(dir.path().join(name)).unwrap();
        let mut shown = Vec::new();
        let script = "s\n".repeat(60);
        ask(&many, &mut log, &mut script.as_bytes(), &mut shown, OPTIONS).unwrap();
        String::from_utf8(shown).unwrap()
    };
    let (once, again) = (shown("a.jsonl"), shown("b.jsonl"));
    assert_eq!(once, again);
    let first = lefts(&once)
        .iter()
        .filter(|l| l.starts_with("first"))
        .count();
    assert!((15..=45).contains(&first), "{first} of 60"); // four deviations of a fair coin
}

#[test]
fn back_takes_choices_back_even_of_an_earlier_session() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("feedback.jsonl");
    let (report, shown) = play(&path, "l\nt\nb\nb\nb\nr\nq\n");
    assert_eq!(
        (report.end, report.answered, report.left),
        (End::Quit, 1, 4)
    );
    assert!(shown.contains("no choice of these questions to go back to"));
    let first = preferences(&path);
    assert_eq!(first.len(), 1);
    // Killed: the next session begins where it was, and goes back further.
    let (report, _) = play(&path, "b\nl\nl\n");
    assert_eq!(
        (report.end, report.answered, report.left),
        (End::EndOfInput, 1, 3)
    );
    let second = preferences(&path);
    assert_eq!(second.len(), 2);
    assert_ne!(first[0], second[0]);
    // A tie that is taken back is not in its file any more.
    let undecided = dir.path().join("feedback.undecided.jsonl");
    assert_eq!(std::fs::read_to_string(undecided).unwrap(), "");
    // Numbers went on, so the order of both files is still known.
    let (_, _) = play(&path, "s\nr\nb\nb\nb\nq\n");
    assert_eq!(preferences(&path).len(), 1);
}

#[test]
fn a_torn_last_line_is_removed_wherever_it_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("feedback.jsonl");
    play(&path, "l\nr\n");
    let whole = std::fs::read(&path).unwrap();
    let first_line = whole.iter().position(|b| *b == b'\n').unwrap() + 1;
    for length in first_line + 1..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let log = FeedbackLog::open(&path).unwrap();
        let complete = length == whole.len() - 1;
        let recovery = match complete {
            true => Recovery::Completed { path: path.clone() },
            false => Recovery::Removed {
                path: path.clone(),
                bytes: length - first_line,
            },
        };
        assert_eq!(log.recoveries(), [recovery], "{length}");
        assert_eq!(log.preferences(), if complete { 2 } else { 1 });
        drop(log);
        let kept = std::fs::read(&path).unwrap();
        let expected = if complete {
            &whole[..]
        } else {
            &whole[..first_line]
        };
        assert_eq!(kept, expected, "{length}");
    }
    // The question whose choice was lost is asked again, and the line is whole.
    std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    let (report, _) = play(&path, "r\nq\n");
    assert_eq!((report.answered, report.left), (1, 3));
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    // Zeros at the end, as some file systems leave them.
    std::fs::write(&path, [&whole[..], &[0; 512]].concat()).unwrap();
    assert_eq!(FeedbackLog::open(&path).unwrap().preferences(), 2);
}

#[test]
fn damage_elsewhere_and_a_second_session_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("feedback.jsonl");
    play(&path, "l\nr\n");
    let open = FeedbackLog::open(&path).unwrap();
    assert!(
        FeedbackLog::open(&path).is_err(),
        "two sessions on one file"
    );
    drop(open);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("chosen", "chozen", 1)).unwrap();
    let error = FeedbackLog::open(&path).unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
}

#[test]
fn lines_of_others_count_but_are_never_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("feedback.jsonl");
    let line = r#"{"prompt": "Question 1?", "chosen": "second 1", "rejected": "first 1"}"#;
    std::fs::write(&path, format!("{line}\n\n")).unwrap();
    let mut log = FeedbackLog::open(&path).unwrap();
    assert!(log.is_answered(&questions()[1]) && !log.is_answered(&questions()[0]));
    assert_eq!((log.last(), log.undo().unwrap()), (None, None));
    log.record(&questions()[0], Choice::Second).unwrap();
    assert_eq!(log.undo().unwrap(), Some(questions()[0].id()));
    drop(log);
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        format!("{line}\n\n")
    );
}

#[test]
fn texts_cannot_command_the_terminal_and_are_wrapped() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = FeedbackLog::open(dir.path().join("feedback.jsonl")).unwrap();
    let question = Question {
        prompt: "a \u{1b}[2J b".into(),
        answers: ["word ".repeat(30), "\u{7}x".repeat(50)],
    };
    let mut shown = Vec::new();
    ask(
        &[question],
        &mut log,
        &mut &b"\xff\nl\n"[..],
        &mut shown,
        OPTIONS,
    )
    .unwrap();
    let shown = String::from_utf8(shown).unwrap();
    assert!(
        !shown.contains(|c: char| c.is_control() && c != '\n'),
        "{shown:?}"
    );
    assert!(
        shown.lines().all(|line| line.chars().count() <= 2 * 40),
        "{shown}"
    );
    let body = shown.lines().filter(|line| line.contains(" | "));
    assert!(
        body.into_iter().all(|line| line.chars().count() <= 40),
        "{shown}"
    );
}

#[test]
fn questions_on_which_heads_differ_come_first() {
    let heads = HeadEnsemble::new(TokenMean::new(4), Combination::Mean).unwrap();
    let questions: Vec<_> = (0..8i64)
        .map(|i| Preference::new([1], [i], [(i * 5 + 2) % 12, i]))
        .collect();
    let judge = |c: &Completions| heads.score_with_disagreement(c);
    let order = most_informative(judge, &questions, 3).unwrap();
    let values: Vec<f64> = order
        .iter()
        .map(|&i| {
            let batch = rlhf_reward::core::PreferenceBatch::new(vec![questions[i].clone()]);
            let both = Completions::written(batch.unwrap().interleaved().unwrap());
            let members = judge(&both).unwrap().members;
            let differences: Vec<f64> = (0..4)
                .map(|h| members.double_value(&[0, h]) - members.double_value(&[1, h]))
                .collect();
            rlhf_reward::feedback::information(&differences)
        })
        .collect();
    assert!(
        values.windows(2).all(|pair| pair[0] >= pair[1]),
        "{values:?}"
    );
    assert!(values[0] > values[7] && values.iter().all(|v| *v >= -1e-12));
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..8).collect::<Vec<_>>());
}
