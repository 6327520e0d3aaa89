// Merges user data with a NodeConfig as Karpenter does, by its own code: reads both files, writes the archive.
package main

import (
	"encoding/base64"
	"log"
	"os"

	"github.com/aws/karpenter-provider-aws/pkg/providers/amifamily/bootstrap/mime"
)

func main() {
	custom, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	config, err := os.ReadFile(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	archive, err := mime.NewArchive(string(custom))
	if err != nil {
		log.Fatal(err)
	}
	archive = append(archive, mime.Entry{ContentType: mime.ContentTypeNodeConfig, Content: string(config)})
	merged, err := archive.Serialize()
	if err != nil {
		log.Fatal(err)
	}
	text, err := base64.StdEncoding.DecodeString(merged)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := os.Stdout.Write(text); err != nil {
		log.Fatal(err)
	}
}
