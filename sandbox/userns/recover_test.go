package userns

const victimEnv = "KILN_TEST_VICTIM"

func victim(string) {}
