// Command sshask asks the SSH agent for its identities and prints the answer in
// hexadecimal.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	c, err := net.Dial("unix", os.Getenv("SSH_AUTH_SOCK"))
	if err == nil {
		_, err = c.Write([]byte{0, 0, 0, 1, 11})
	}
	answer := make([]byte, 9)
	if err == nil {
		_, err = io.ReadFull(c, answer)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Printf("%x\n", answer)
}
