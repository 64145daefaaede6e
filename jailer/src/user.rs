//! Who a jailed process is.

use std::fs;
use std::io;

/// User and group that own nothing (`nobody`): what the kernel shows for everybody whom it cannot name.
const NOBODY: u32 = 65534;

/// User and group of a jailed process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
}

/// Nobody of that name.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// There is no such user or group.
    #[error(
        "{kind} {name:?} does not exist in {file}; a number that has no name is written with a plus, such as +1234"
    )]
    Unknown {
        /// `user` or `group`.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// The list cannot be read.
    #[error("read {file}")]
    Read {
        /// The list.
        file: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A list of names and numbers (passwd(5), group(5)): name, password, number, and for users the number of their group.
struct List {
    kind: &'static str,
    file: &'static str,
}

const USERS: List = List { kind: "user", file: "/etc/passwd" };
const GROUPS: List = List { kind: "group", file: "/etc/group" };

impl User {
    /// Nobody.
    pub const NOBODY: Self = Self { uid: NOBODY, gid: NOBODY };

    /// Looks up a user and a group by name or number; without a group it is the user's own. `+NUMBER` is taken as it is:
    /// users that exist for one jail alone have no name.
    ///
    /// # Errors
    /// [`UserError`].
    pub fn find(user: &str, group: Option<&str>) -> Result<Self, UserError> {
        let read = |list: &List| {
            fs::read_to_string(list.file)
                .map_err(|source| UserError::Read { file: list.file, source })
        };
        // The highest number is nobody's: for the kernel it means "leave it as it is".
        let bare = |text: &str| {
            let number: Option<u32> = text.strip_prefix('+')?.parse().ok();
            number.filter(|number| *number != u32::MAX)
        };
        let (uid, own_gid) = match bare(user) {
            Some(uid) => (uid, uid),
            None => USERS.find(&read(&USERS)?, user)?,
        };
        let gid = match group {
            None => own_gid,
            Some(group) => match bare(group) {
                Some(gid) => gid,
                None => GROUPS.find(&read(&GROUPS)?, group)?.0,
            },
        };
        Ok(Self { uid, gid })
    }
}

impl List {
    /// The numbers of the entry with this name or number. Groups have no second number; then it is the first again.
    fn find(&self, text: &str, wanted: &str) -> Result<(u32, u32), UserError> {
        let entry = text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, number) = (fields.next()?, fields.nth(1)?);
            let number_value = number.parse().ok()?;
            let second = fields.next().and_then(|field| field.parse().ok());
            (name == wanted || number == wanted)
                .then_some((number_value, second.unwrap_or(number_value)))
        });
        entry.ok_or_else(|| UserError::Unknown {
            kind: self.kind,
            name: wanted.into(),
            file: self.file,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nvm:x:1001:2002::/:/bin/false\n";
    const GROUP: &str = "root:x:0:\nkvm:x:104:vm,other\n";

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let check = |list: &List, text, wanted, expected| {
            assert_eq!(list.find(text, wanted).ok(), expected, "{wanted}");
        };
        check(&USERS, PASSWD, "vm", Some((1001, 2002)));
        check(&USERS, PASSWD, "1001", Some((1001, 2002)));
        check(&USERS, PASSWD, "root", Some((0, 0)));
        check(&USERS, PASSWD, "broken", None);
        check(&USERS, PASSWD, "1002", None);
        check(&GROUPS, GROUP, "kvm", Some((104, 104)));
        check(&GROUPS, GROUP, "104", Some((104, 104)));
    }

    #[test]
    fn a_number_without_a_name_is_taken_with_a_plus_alone() {
        assert_eq!(
            User::find("+4000000000", Some("+7")).unwrap(),
            User { uid: 4_000_000_000, gid: 7 }
        );
        assert_eq!(User::find("+9", None).unwrap(), User { uid: 9, gid: 9 });
        for unknown in ["4000000000", "+", "+x", "+4294967295", "+4294967296", "no such user"] {
            assert!(User::find(unknown, None).is_err(), "{unknown}");
        }
    }
}
