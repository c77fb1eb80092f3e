"""What other trainers compute on inputs that the tests compute on too; each needs an environment with that trainer."""
